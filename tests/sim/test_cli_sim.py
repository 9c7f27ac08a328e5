"""`nexusengine sim` as it is scripted: options, keys, errors, plots."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from nexusengine.cli.main import main

QUICK = ["--trace", "lengths:input=100..900,output=5..40", "--arrivals", "poisson", "--duration", "6"]
QUICK += ["--devices", "rtxpro6000,rtx4090", "--model", "llama-3.1-8b", "--seed", "3"]
LATENCIES = ["ttft_ms", "tpot_ms", "e2e_ms"]
KEYS = ["offered", "completed", "attainment", "attainment_strict", "attainment_by_class", "attainment_longest_decile"]
KEYS += ["attainment_token_weighted", *LATENCIES, "output_tokens_per_s", "worst_wait_s", "preemptions"]
KEYS += ["scheduler_ms_p50"]


def run(capsys: pytest.CaptureFixture[str], *words: str) -> dict[str, Any]:
    assert main(["sim", *words, "--json"]) == 0
    printed: dict[str, Any] = json.loads(capsys.readouterr().out)
    return printed


def test_run_prints_the_keys_that_scripts_rely_on(capsys: pytest.CaptureFixture[str]) -> None:
    m = run(
        capsys,
        "run",
        *QUICK,
        "--rate",
        "5",
        "--engine",
        "fcfs:budget=512",
        "--router",
        "round-robin",
        "--classes",
        "mixed",
    )
    assert set(KEYS) <= set(m)
    assert all(set(m[key]) == {"mean", "p50", "p90", "p99"} for key in LATENCIES)
    assert m["offered"] == m["completed"] > 15
    assert m["spec"]["engine"] == "fcfs:budget=512"
    assert set(m["attainment_by_class"]) <= {"interactive", "standard", "batch"}


def test_the_same_command_prints_the_same_and_another_policy_sees_the_same_load(
    capsys: pytest.CaptureFixture[str],
) -> None:
    first, second = (run(capsys, "run", *QUICK, "--rate", "5") for _ in range(2))
    timed = {"scheduler_ms_p50", "scheduler_ms_p99", "router_ms_p50", "router_ms_p99"}
    assert {k: v for k, v in first.items() if k not in timed} == {k: v for k, v in second.items() if k not in timed}
    other = run(capsys, "run", *QUICK, "--rate", "5", "--engine", "fcfs:budget=64", "--router", "round-robin")
    assert other["workload"] == first["workload"]
    assert other["ttft_ms"] != first["ttft_ms"]


def test_uncertainty_is_the_range_over_slower_and_faster_devices_and_other_seeds(
    capsys: pytest.CaptureFixture[str],
) -> None:
    once = ["run", *QUICK, "--rate", "5", "--no-noise"]
    m = run(capsys, *once, "--uncertainty")
    assert {key: value for key, value in m.items() if key in KEYS and key != "scheduler_ms_p50"} == {
        key: value for key, value in run(capsys, *once).items() if key in KEYS and key != "scheduler_ms_p50"
    }
    found = m["ranges"]
    assert set(LATENCIES) | {"attainment", "output_tokens_per_s"} <= set(found)
    low, high = found["tpot_ms"]["p50"]
    assert low < 0.99 * m["tpot_ms"]["p50"]  # both devices are measured: 3 %
    assert high > 1.01 * m["tpot_ms"]["p50"]
    others = [run(capsys, *once[:-1], "--no-noise", "--seed", seed)["tpot_ms"]["p50"] for seed in ("4", "5")]
    assert low <= min(others)
    assert max(others) <= high
    assert main(["sim", *once, "--uncertainty"]) == 0
    assert "lowest and highest" in capsys.readouterr().out


def test_options_of_engines_and_server_change_what_happens(capsys: pytest.CaptureFixture[str]) -> None:
    base = run(capsys, "run", *QUICK, "--rate", "5")
    for words in (
        ["--no-noise"],
        ["--scheduler-cost", "0.01"],
        ["--link-delay", "0.05"],
        ["--fault", "slow:0:1:5"],
        ["--perf", "oracle", "--no-noise"],
        ["--kv-tokens", "1000"],
        ["--max-batch-tokens", "128"],
        ["--max-running", "1"],
        ["--max-model-len", "500"],
    ):
        m = run(capsys, "run", *QUICK, "--rate", "5", *words)
        assert m["e2e_ms"] != base["e2e_ms"], words
        assert m["offered"] == base["offered"]
    one = run(
        capsys, "run", *QUICK, "--rate", "5", "--snapshot-period", "1", "--loss", "0.5", "--stated-limit", "exact"
    )
    assert one["completed"] == base["completed"]


def test_goodput_prints_its_rate_and_what_it_tried(capsys: pytest.CaptureFixture[str]) -> None:
    m = run(capsys, "goodput", *QUICK, "--target", "0.9", "--longest-decile", "0.75", "--precision", "0.2")
    assert {"goodput_rps", *KEYS} <= set(m)
    assert m["goodput_rps"] in [t["rate_rps"] for t in m["tried"] if t["holds"]]
    assert m["attainment"] >= 0.9
    assert main(["sim", "goodput", *QUICK, "--precision", "0.4"]) == 0
    assert "goodput" in capsys.readouterr().out


def test_sweep_prints_every_point(capsys: pytest.CaptureFixture[str]) -> None:
    words = ["sweep", *QUICK, "--rates", "2,4", "6", "--engines", "fcfs", "fcfs:budget=128", "--jobs", "1"]
    m = run(capsys, *words)
    assert [(p["engine"], p["rate_rps"]) for p in m["points"]] == [
        (e, r) for e in ("fcfs", "fcfs:budget=128") for r in (2.0, 4.0, 6.0)
    ]
    assert all(set(KEYS) <= set(p["metrics"]) for p in m["points"])
    assert main(["sim", *words]) == 0
    assert "fcfs:budget=128" in capsys.readouterr().out


def test_without_json_it_prints_tables(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["sim", "run", *QUICK, "--rate", "5"]) == 0
    printed = capsys.readouterr().out
    assert all(word in printed for word in ("attainment", "ttft", "rtx4090", "worst wait"))


def test_plots_are_pictures(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    pytest.importorskip("matplotlib", reason="the plot extra is not installed")
    for name, words in (
        ("run.png", ["run", "--rate", "5"]),
        ("sweep.png", ["sweep", "--rates", "2,4", "--jobs", "1"]),
        ("goodput.png", ["goodput", "--precision", "0.5"]),
    ):
        path = tmp_path / name
        run(capsys, words[0], *QUICK, *words[1:], "--plot", str(path))
        assert path.read_bytes().startswith(b"\x89PNG")
        assert path.stat().st_size > 10_000


@pytest.mark.parametrize(
    ("words", "complaint"),
    [
        (["--engine", "magic"], "unknown engine policy 'magic'"),
        (["--router", "magic"], "unknown placement policy 'magic'"),
        (["--devices", "abacus"], "no profile of a device 'abacus'"),
        (["--devices", ","], "names 0 devices"),
        (["--classes", "gold"], "classes are"),
        (["--perf", "magic"], "perf is online"),
        (["--scheduler-cost", "some"], "--scheduler-cost is measured or seconds"),
        (["--scheduler-cost", "5"], "scheduler cost must be 0 to 1 s"),
        (["--loss", "1"], "loss must be between"),
        (["--snapshot-period", "9"], "snapshot_period_s must be between"),
        (["--fault", "melt:0:1"], "a fault is slow"),
        (["--rate", "-1"], "rate must be a number above 0"),
        (["--trace", "nowhere.csv"], "cannot read nowhere.csv"),
        (["--seed", "-1"], "seed must be between"),
        (["--kv-tokens", "10"], "kv_tokens must be at least one block"),
    ],
)
def test_what_is_wrong_is_said_in_one_line(
    words: list[str], complaint: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["sim", "run", *QUICK, "--rate", "5", *words]) == 1
    error = capsys.readouterr().err
    assert complaint in error
    assert error.count("\n") == 1


@pytest.mark.parametrize(
    ("words", "complaint"),
    [
        (["--seeds", "0"], "--seeds must be at least 1, got 0"),
        (["--first-rate", "0"], "first_rate must be a number above 0, got 0.0"),
        (["--first-rate", "nan"], "first_rate must be a number above 0, got nan"),
    ],
)
def test_a_zero_is_not_taken_as_not_given(words: list[str], complaint: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["sim", "goodput", *QUICK, *words]) == 1
    error = capsys.readouterr().err
    assert complaint in error
    assert error.count("\n") == 1


def test_a_plot_without_matplotlib_is_refused_before_the_simulation(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    import importlib.util

    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    assert main(["sim", "run", *QUICK, "--rate", "5", "--plot", str(tmp_path / "x.png")]) == 1
    assert "nexusengine[plot]" in capsys.readouterr().err
    assert not (tmp_path / "x.png").exists()


def test_kv_blocks_that_do_not_fit_into_the_traces_are_refused(
    capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    trace = tmp_path / "trace.jsonl"
    trace.write_text('{"arrival_s": 0, "input_tokens": 700, "output_tokens": 5, "hash_ids": [4, 9]}\n')
    words = ["sim", "run", "--trace", str(trace), "--devices", "rtx4090", "--block-size", "48"]
    assert main([*words, "--json"]) == 0
    capsys.readouterr()
    assert main([*words, "--prefix-caching"]) == 1
    assert "not made of KV blocks of 48" in capsys.readouterr().err
