"""What the CPU benchmark computes from what it measured; the measuring itself is not a test."""

from __future__ import annotations

import tomllib
from typing import Any

import pytest

from benchmarks.cpu_slo import Device, classes_toml, main, summary_of, table
from nexusengine.errors import ConfigError


def test_the_classes_are_the_built_in_ones_in_units_of_the_device() -> None:
    usual = tomllib.loads(classes_toml(Device(0.010, 0.0001), 0.6))
    assert usual == {
        "interactive": {"ttft_s": 0.5, "ttft_per_token_s": 0.001, "tpot_s": 0.05, "share": 0.6},
        "batch": {"ttft_s": 30.0, "ttft_per_token_s": 0.004, "tpot_s": 0.5, "share": 0.4},
    }
    slow = tomllib.loads(classes_toml(Device(0.040, 0.005), 0.6))["interactive"]
    assert (slow["ttft_s"], slow["ttft_per_token_s"], slow["tpot_s"]) == (2.0, 0.05, 0.2)


def run(scheduler: str, number: int, attainment: float) -> dict[str, Any]:
    spread = {"p50": 1.0, "p99": 2.0}
    return {
        "scheduler": scheduler,
        "run": number,
        "attainment": attainment,
        "attainment_strict": attainment,
        "attainment_longest_decile": attainment,
        "attainment_token_weighted": attainment,
        "attainment_by_class": {"batch": 1.0, "interactive": attainment},
        "output_tokens_per_s": 10.0,
        "worst_wait_s": 3.0,
        "ttft_ms": spread,
        "tpot_ms": spread,
    }


def test_runs_on_the_same_requests_are_compared_pair_by_pair() -> None:
    runs = [run("b", 0, 0.4), run("a", 0, 0.9), run("a", 1, 0.5), run("b", 1, 0.4), run("b", 2, 0.2), run("a", 2, 0.8)]
    found = summary_of(runs, ["a", "b"])
    assert found["gain_points"] == pytest.approx([50.0, 10.0, 60.0])
    assert found["gain_points_median"] == pytest.approx(50.0)
    assert found["medians"]["a"]["attainment"] == 0.8
    assert found["medians"]["b"]["attainment_interactive"] == 0.4
    assert "+50.0, +10.0, +60.0" in table(found, ["a", "b"])


def test_two_different_schedulers_are_wanted() -> None:
    for schedulers in ("lens", "lens,lens", "a,b,c"):
        with pytest.raises(ConfigError, match="two policies"):
            main(["--schedulers", schedulers])
