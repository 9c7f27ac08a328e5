"""`nexusengine plan`: candidates, prices, head-room, and what limits each."""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

import pytest

from nexusengine.cli import plan as command
from nexusengine.errors import ConfigError
from nexusengine.profiles.base import DeviceProfile
from nexusengine.profiles.prices import DeviceCost
from nexusengine.sim.api import SimSpec
from nexusengine.sim.plan import Plan, Planned, bottleneck, parse_candidates, plan, price_of
from tests.sim.fakes import FormulaProfile

SPEEDS = {"fast": 0.6, "slow": 0.25, "tiny": 0.08}
PRICES = {"fast": DeviceCost(4.0, 50.0, 300.0), "slow": DeviceCost(1.0, 10.0, 60.0), "tiny": DeviceCost(0.1)}


def load(device: str, model: str) -> DeviceProfile:
    return FormulaProfile(20_000, SPEEDS[device])


SPEC = SimSpec(
    trace="lengths:input=100..900,output=10..60",
    devices="fast",
    arrivals="poisson",
    rate_rps=6.0,
    duration_s=5.0,
    engine="lens",
    router="prism",
    max_model_len=4096,
)


def test_candidates_are_lists_of_devices() -> None:
    assert parse_candidates("2xh100; h100+4xl4 ;a100,l4;") == ["2xh100", "h100,4xl4", "a100,l4"]
    for wrong in ("", ";", "2000xl4"):
        with pytest.raises(ConfigError):
            parse_candidates(wrong)


def test_prices_add_up_and_an_unknown_one_makes_the_sum_unknown() -> None:
    assert price_of("fast,2xslow", PRICES) == 6.0
    assert price_of("fast,other", PRICES) is None
    assert price_of("fast/some-model", PRICES) == 4.0


def test_a_plan_says_what_serves_the_load_at_what_cost_and_with_how_much_to_spare() -> None:
    candidates = ["fast", "2xslow", "tiny"]
    said: list[str] = []
    made = plan(SPEC, candidates, prices=PRICES, load_profile=load, precision=0.5, progress=said.append)
    fast, slow, tiny = made.candidates
    assert (made.rate_rps, [c.devices for c in made.candidates]) == (6.0, candidates)
    assert fast.serves(0.99, 0.75)
    assert not tiny.serves(0.9, 0.75)
    best = made.cheapest(0.9)
    assert best is not None
    assert best.devices == ("2xslow" if slow.serves(0.9, 0.75) else "fast")
    for c in made.candidates:
        high, higher = c.goodput_rps
        assert high is not None
        assert higher is not None
        assert higher <= high * 1.5
        assert c.serves(0.9, 0.75) == (high >= 6.0)
    assert all(c.bottleneck != "none seen" for c in made.candidates)
    assert said


def test_without_a_search_only_the_offered_load_is_simulated() -> None:
    made = plan(SPEC, ["fast", "tiny"], prices={}, load_profile=load, head_room=False)
    assert all(c.goodput_rps == (None, None) for c in made.candidates)
    assert made.cheapest(0.9) is None, "no price is known"


def metrics(missed: dict[str, int], kv_peak: float = 0.5, busy: float = 0.9) -> dict[str, Any]:
    workers = [{"device": "l4", "kv_peak": kv_peak, "busy": busy}, {"device": "h100", "kv_peak": 0.1, "busy": 0.2}]
    return {"missed": missed, "offered": 100, "attainment_by_class": {"a": 0.9, "b": 0.5}, "workers": workers}


@pytest.mark.parametrize(
    ("missed", "kv_peak", "words"),
    [
        ({}, 0.5, "none seen"),
        ({"ttft": 30, "tpot": 3}, 0.5, "prompt computation, l4 90 % busy (30 % missed by ttft, most in class b)"),
        ({"ttft": 30, "tpot": 3}, 1.0, "KV memory of l4"),
        ({"ttft": 3, "tpot": 30}, 1.0, "decode steps"),
        ({"refused": 9}, 0.5, "full queues"),
        ({"worker_lost": 9}, 0.5, "worker lost"),
    ],
)
def test_the_bottleneck_is_what_most_promises_are_missed_by(missed: dict[str, int], kv_peak: float, words: str) -> None:
    assert bottleneck(metrics(missed, kv_peak)).startswith(words)


def test_the_cheapest_that_serves_is_told() -> None:
    def planned(devices: str, price: float | None, share: float) -> Planned:
        return Planned(devices, price, share, 1.0, (None,), "", {})

    made = Plan(1.0, (0.9,), 0.75, (planned("a", 5.0, 0.95), planned("b", 3.0, 0.91), planned("c", 1.0, 0.5)))
    assert [getattr(made.cheapest(t), "devices", None) for t in (0.9, 0.95, 0.99)] == ["b", "a", None]


def arguments(*words: str) -> argparse.Namespace:
    parser = argparse.ArgumentParser()
    command.add_arguments(parser)
    return parser.parse_args(["--trace", str(SPEC.trace), "--arrivals", "poisson", "--duration", "3", *words])


def test_the_command_prints_json_and_takes_a_promise_in_numbers(capsys: pytest.CaptureFixture[str]) -> None:
    words = ("--rate", "2", "--candidates", "h100; 2xl4", "--slo", "1000:40:1", "--no-head-room", "--json")
    assert command.run(arguments(*words, "--prices", "h100=2,l4=9")) == 0
    told = json.loads(capsys.readouterr().out)
    assert [c["price_per_hour"] for c in told["candidates"]] == [2.0, 18.0]
    assert told["candidates"][0]["metrics"]["attainment_by_class"] == {"promised": 1.0}
    assert told["cheapest"] == {"0.9": "h100", "0.99": "h100"}, "no L4 decodes in 40 ms"
    assert command.run(arguments(*words[:-1])) == 0
    assert "cheapest is h100" in capsys.readouterr().out


@pytest.mark.parametrize(
    "words",
    [
        ("--slo", "fast"),
        ("--slo", "1:2:3:4"),
        ("--targets", "90"),
        ("--targets", ""),
        ("--prices", "h100=cheap"),
        ("--prices", "h100=-1"),
        ("--prices", "/nonexistent.toml"),
        ("--prices", "h100=nan"),
        ("--candidates", "abacus"),
    ],
)
def test_what_cannot_be_is_named(words: tuple[str, ...]) -> None:
    with pytest.raises(ConfigError):
        command.run(arguments("--candidates", "h100", "--no-head-room", *words))


def test_a_plan_tells_money_and_energy_and_ranks_by_either(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Dollars a million tokens and joules a token from the simulation's own tokens, time and busy shares."""
    (tmp_path / "p.toml").write_text("h100 = 7\n[l4]\nprice = 0.5\nidle_w = 20\nbusy_w = 80\n")
    words = ("--rate", "2", "--candidates", "h100; 2xl4; a10", "--no-head-room", "--json", "--classes", "batch")
    assert command.run(arguments(*words, "--prices", str(tmp_path / "p.toml"), "--rank", "energy")) == 0
    told = json.loads(capsys.readouterr().out)
    _, l4, a10 = told["candidates"]
    assert [c["price_per_hour"] for c in told["candidates"]] == [7.0, 1.0, None]
    metrics, costs = l4["metrics"], l4["costs"]
    tokens = sum(w["generated_tokens"] for w in metrics["workers"])
    seconds = metrics["offered"] / metrics["offered_rps"]
    joules = sum(20 * seconds + 60 * w["busy"] * metrics["simulated_s"] for w in metrics["workers"])
    assert costs["joules_per_token"] == pytest.approx(joules / tokens)
    assert costs["usd_per_million_tokens"] == pytest.approx(1.0 * seconds / 3600 / tokens * 1e6)
    assert costs["joules_per_kept"] == pytest.approx(joules / metrics["offered"] / metrics["attainment"])
    assert (a10["costs"]["usd_per_kept"], a10["costs"]["price_per_hour"]) == (None, None)
    assert a10["costs"]["joules_per_token"] > 0
    serving = {c["devices"]: c["costs"]["joules_per_token"] for c in told["candidates"] if c["attainment"] >= 0.9}
    assert len(serving) >= 2
    assert told["cheapest"]["0.9"] == min(serving, key=lambda name: serving[name])
    assert command.run(arguments(*words[:-3], "--rank", "tokens")) == 0
    assert "$/M tokens" in capsys.readouterr().out
