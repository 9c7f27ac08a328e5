"""Workloads: trace formats, arrivals, lengths, classes, clipping, closed loops; all of it fixed by the seed."""

from __future__ import annotations

import json
from collections import Counter
from pathlib import Path

import numpy as np
import pytest

from nexusengine.errors import ConfigError
from nexusengine.sim.job import Job, TraceBlocks, make_job
from nexusengine.sim.workload.entries import read_trace
from nexusengine.sim.workload.runs import Runs
from nexusengine.sim.workload.servegen import ServeGen
from nexusengine.sim.workload.sessions import named_blocks
from tests.support.workloads import arrivals, build, lengths

SYNTHETIC = "lengths:input=logn:1000:2700,output=exp:200"


# ---- arrivals ----------------------------------------------------------------------------------------------------


def test_trace_arrivals_are_those_of_the_trace_or_scaled_to_a_rate(conv: Path) -> None:
    assert arrivals(build(conv)).tolist() == [2.0 * i for i in range(100)]
    fast = build(conv, rate_rps=5.0)
    assert arrivals(fast) == pytest.approx(0.2 * np.arange(100))
    assert lengths(fast) == lengths(build(conv))
    assert fast.notes["rate_rps"] == pytest.approx(5.0, rel=0.02)


def test_a_window_begins_at_the_beginning_for_seed_0_and_elsewhere_for_others(conv: Path) -> None:
    assert lengths(build(conv, duration_s=20.0)) == lengths(build(conv))[:10]
    starts = {build(conv, duration_s=20.0, seed=s).jobs[0].prompt_tokens for s in range(1, 6)}
    assert len(starts) > 2
    assert all(len(build(conv, duration_s=20.0, seed=s).jobs) == 10 for s in range(1, 6))


def test_a_trace_that_is_too_short_is_repeated(conv: Path) -> None:
    longer = build(conv, duration_s=500.0)
    assert arrivals(longer) == pytest.approx(2.0 * np.arange(250))
    assert lengths(longer)[100:200] == lengths(longer)[:100]


@pytest.mark.parametrize(("text", "cv"), [("poisson", 1.0), ("gamma:0.3", 0.3), ("gamma:2.5", 2.5)])
def test_generated_arrivals_have_the_rate_and_the_variation_asked_for(text: str, cv: float) -> None:
    gaps = np.diff(arrivals(build(SYNTHETIC, arrivals=text, rate_rps=10.0, duration_s=2000.0)))
    assert gaps.mean() == pytest.approx(0.1, rel=0.06)
    assert gaps.std() / gaps.mean() == pytest.approx(cv, rel=0.1)


def test_every_rate_sees_the_same_requests_in_the_same_pattern(conv: Path) -> None:
    slow, fast = (build(conv, arrivals="gamma:2", rate_rps=r, duration_s=200.0, seed=7) for r in (2.0, 6.0))
    n = len(slow.jobs)
    assert lengths(fast)[:n] == lengths(slow)
    assert arrivals(fast)[:n] == pytest.approx(arrivals(slow) / 3.0)
    assert [j.request.slo_class for j in fast.jobs[:n]] == [j.request.slo_class for j in slow.jobs]


@pytest.mark.parametrize("text", ["burst", "gamma", "gamma:0", "gamma:x", "poisson:2", ""])
def test_unknown_arrivals_are_refused(text: str) -> None:
    with pytest.raises(ConfigError, match="gamma:CV"):
        build(SYNTHETIC, arrivals=text)


def test_what_has_no_rate_or_no_arrivals_asks_for_them(tmp_path: Path) -> None:
    path = tmp_path / "lengths.csv"
    path.write_text("arrival_s,input_tokens,output_tokens\n,5,6\n,7,8\n")
    for trace in (path, SYNTHETIC):
        with pytest.raises(ConfigError, match="no arrival times"):
            build(trace)
        with pytest.raises(ConfigError, match="give --rate"):
            build(trace, arrivals="poisson")
    with pytest.raises(ConfigError, match="no request arrives"):
        build(path, arrivals="poisson", rate_rps=0.001, duration_s=1.0)
    for wrong in ({"rate_rps": -1.0}, {"rate_rps": float("nan")}, {"duration_s": 0.0}, {"scale": 0.0}):
        with pytest.raises(ConfigError, match="must be a number above 0"):
            build(path, arrivals="poisson", **wrong)


def test_requests_that_all_arrive_at_once_have_no_rate(tmp_path: Path) -> None:
    path = tmp_path / "burst.csv"
    path.write_text("arrival_s,input_tokens,output_tokens\n7,5,6\n7,7,8\n")
    assert arrivals(build(path)).tolist() == [0.0, 0.0]
    with pytest.raises(ConfigError, match="they have no rate"):
        build(path, rate_rps=2.0)


# ---- lengths -----------------------------------------------------------------------------------------------------


def test_lengths_alone_come_shuffled_and_each_once_before_any_again(conv: Path) -> None:
    workload = build(conv, arrivals="poisson", rate_rps=10.0, duration_s=20.0, seed=3)
    assert len(workload.jobs) > 150
    first = lengths(workload)[:100]
    assert sorted(first) == sorted(lengths(build(conv)))
    assert first != sorted(first)


@pytest.mark.parametrize(
    ("words", "low", "high", "mean"),
    [
        ("512", 512, 512, 512),
        ("100..300", 100, 300, 200),
        ("exp:200", 1, 3000, 200),
        ("logn:1000:1000", 1000, 1000, 1000),
    ],
)
def test_synthetic_lengths_follow_their_distribution(words: str, low: int, high: int, mean: float) -> None:
    trace = f"lengths:input={words},output={words}"
    workload = build(trace, arrivals="poisson", rate_rps=100.0, duration_s=100.0)
    for values in np.array(lengths(workload)).T:
        assert low <= values.min() <= values.max() <= high
        assert values.mean() == pytest.approx(mean, rel=0.05)


def test_a_log_normal_has_the_median_and_the_ninth_decile_asked_for() -> None:
    workload = build("lengths:input=logn:1020:2735,output=1", arrivals="poisson", rate_rps=100.0, duration_s=100.0)
    p50, p90 = np.percentile([n for n, _ in lengths(workload)], (50, 90))
    assert p50 == pytest.approx(1020, rel=0.05)
    assert p90 == pytest.approx(2735, rel=0.07)


@pytest.mark.parametrize(
    "words", ["input=5", "input=5,output=x", "input=9..5,output=1", "input=0,output=1", "input=exp,output=1"]
)
def test_an_unknown_distribution_is_refused(words: str) -> None:
    with pytest.raises(ConfigError, match=r"lengths:|LOW\.\.HIGH"):
        build(f"lengths:{words}", arrivals="poisson", rate_rps=1.0)


def test_what_exceeds_the_context_is_clipped_and_counted(conv: Path) -> None:
    workload = build(conv, max_tokens=600)
    assert all(a + b <= 600 for a, b in lengths(workload))
    assert workload.notes["prompts_clipped"] == sum(500 + i + 1 + i > 600 for i in range(100))
    assert workload.notes["outputs_clipped"] == 0
    halved = build(conv, scale=2.0)
    assert lengths(halved)[50] == (275, 25)
    assert halved.notes["lengths_divided_by"] == 2.0


def test_clients_state_no_limit_an_exact_one_or_a_number(conv: Path) -> None:
    for text, stated, comes in (("none", None, 81), ("exact", 81, 81), ("50", 50, 50), ("5000", 4420, 81)):
        job = build(conv, stated_limit=text, max_tokens=5000).jobs[80]
        assert (job.request.sampling.max_tokens, job.output_tokens) == (stated, comes)
    with pytest.raises(ConfigError, match="stated_limit"):
        build(conv, stated_limit="some")


# ---- classes -----------------------------------------------------------------------------------------------------


def test_mixed_classes_have_their_shares_and_each_request_its_promise(conv: Path) -> None:
    workload = build(SYNTHETIC, arrivals="poisson", rate_rps=50.0, duration_s=100.0, classes="mixed")
    counts = Counter(job.request.slo_class for job in workload.jobs)
    n = len(workload.jobs)
    for name, share in (("interactive", 0.6), ("standard", 0.25), ("batch", 0.15)):
        assert counts[name] / n == pytest.approx(share, abs=0.03)
    job = next(j for j in workload.jobs if j.request.slo_class == "standard")
    assert job.request.slo is not None
    assert job.request.slo.ttft_s == pytest.approx(2.0 + 0.002 * job.prompt_tokens)
    only = build(conv, classes="batch")
    assert {j.request.slo_class for j in only.jobs} == {"batch"}


def test_classes_come_from_a_file(conv: Path, tmp_path: Path) -> None:
    path = tmp_path / "mine.toml"
    path.write_text("[quick]\nttft_s = 1\ntpot_s = 0.1\nshare = 3\n[slow]\nttft_s = 9\ntpot_s = 1\nshare = 1\n")
    counts = Counter(job.request.slo_class for job in build(conv, classes=str(path), duration_s=2000.0).jobs)
    assert counts["quick"] / 1000 == pytest.approx(0.75, abs=0.05)
    path.write_text("[quick]\nttft_s = 1\ntpot_s = 0.1\n")
    with pytest.raises(ConfigError, match="share above 0"):
        build(conv, classes=str(path))
    with pytest.raises(ConfigError, match="interactive, standard, batch, mixed"):
        build(conv, classes="gold")


# ---- blocks and sessions -----------------------------------------------------------------------------------------


def test_the_ids_of_a_trace_name_kv_blocks_by_id_and_place() -> None:
    job = make_job("r", 0.0, 700, 100, blocks=TraceBlocks((4, 9), 512, 700))
    names = job.block_names(16)
    assert len(names) == len(set(names)) == 700 // 16
    other = make_job("s", 0.0, 600, 1, blocks=TraceBlocks((4, 7), 512, 600)).block_names(16)
    assert names[:32] == other[:32]
    assert not set(names[32:]) & set(other[32:])
    elsewhere = make_job("t", 0.0, 600, 1, blocks=TraceBlocks((4, 7), 512, 600, scope=1)).block_names(16)
    assert not set(elsewhere) & set(other)
    with pytest.raises(ValueError, match="not made of KV blocks of 24"):
        job.block_names(24)


def test_runs_are_a_sequence_of_their_numbers() -> None:
    numbers = [3, 4, 5, 9, 10, 2]
    runs = Runs([(3, 2), (5, 1), (9, 2), (7, 0), (2, 1)])
    assert list(runs) == numbers
    assert [runs[i] for i in range(-6, 6)] == numbers * 2
    for cut in range(8):
        assert list(runs[:cut]) == numbers[:cut]
        assert runs.begins(Runs([(n, 1) for n in numbers[:cut]]))
    assert list(runs[1:4]) == numbers[1:4]
    assert not runs.begins(Runs([(4, 1)]))
    assert not runs.begins(Runs([(3, 3), (9, 2), (2, 2)]))
    with pytest.raises(IndexError):
        runs[6]


def write_sessions(path: Path) -> Path:
    rows = [
        {"session": "a", "input_tokens": 640, "output_tokens": 70, "hash_runs": [[1, 10]], "think_s": 0},
        {"session": "b", "input_tokens": 128, "output_tokens": 10, "hash_runs": [[1, 2]], "think_s": 0},
        {"session": "a", "input_tokens": 800, "output_tokens": 30, "hash_runs": [[1, 12]], "think_s": 5.5},
        {"session": "a", "input_tokens": 320, "output_tokens": 30, "hash_runs": [[90, 5]], "think_s": 2},
    ]
    path.write_text("\n".join(map(json.dumps, rows)))
    return path


def test_sessions_are_chains_with_pauses(tmp_path: Path) -> None:
    path = write_sessions(tmp_path / "agents.jsonl")
    trace = read_trace(path)
    assert [len(s) for s in trace.sessions] == [3, 1]
    assert named_blocks(trace.sessions[0], 0) == (trace.sessions[0][1].block_ids, True)
    assert named_blocks(trace.sessions[0], 1) == (trace.sessions[0][1].block_ids, False)
    workload = build(path, arrivals="poisson", rate_rps=1.0, duration_s=100.0)
    head = next(j for j in workload.jobs if j.then is not None)
    chain: list[Job] = [head]
    while chain[-1].then is not None:
        chain.append(chain[-1].then)
    assert [(j.prompt_tokens, j.output_tokens, j.think_s) for j in chain] == [
        (640, 70, 5.5),
        (800, 30, 2.0),
        (320, 30, 0.0),
    ]
    assert len({j.request.slo_class for j in chain}) == 1
    first, second, third = (j.block_names(16) for j in chain)
    assert (len(first), len(second)) == ((640 + 70) // 16, 12 * 64 // 16)  # the second's ids end with its full blocks
    assert second[: len(first)] == first
    assert not set(third) & set(second)
    scaled = build(path, arrivals="poisson", rate_rps=1.0, duration_s=100.0, scale=2.0)
    head = next(j for j in scaled.jobs if j.then is not None)
    assert (head.prompt_tokens, head.output_tokens) == (320, 35)
    with pytest.raises(ConfigError, match="sessions a second"):
        build(path)


def test_sessions_are_scaled_until_nearly_all_of_them_fit(tmp_path: Path) -> None:
    path = write_sessions(tmp_path / "agents.jsonl")
    workload = build(path, arrivals="poisson", rate_rps=1.0, duration_s=50.0, max_tokens=400)
    assert workload.notes["lengths_divided_by"] == pytest.approx(830 / 400, rel=0.02)
    assert max(j.prompt_tokens + j.output_tokens for j in workload.jobs) <= 400


# ---- client models -----------------------------------------------------------------------------------------------


def write_clients(path: Path) -> Path:
    quantiles = [100 + 10 * i for i in range(25)]
    lengths = {"0": {"input_tokens": quantiles, "output_tokens": [7] * 25}, "21600": {"input_tokens": "{}"}}
    rows = [
        {
            "client": 0,
            "rate_windows": [[600 * i, 2.0, 1.5, "Gamma", 1, 1] for i in range(6)],
            "dataset_windows": lengths,
        },
        {
            "client": 1,
            "rate_windows": [[600 * i, 1.0, 1.2, "Weibull", 0.8, 1] for i in range(6)],
            "dataset_windows": lengths,
        },
        {
            "client": 2,
            "rate_windows": [[600 * i, 0.001, 80.0, "Gamma", 1, 1] for i in range(6)],
            "dataset_windows": lengths,
        },
        {"client": 3, "rate_windows": [[0, 9.0, 1.0, "Gamma", 1, 1]], "dataset_windows": {}},
    ]
    path.write_text("\n".join(map(json.dumps, rows)))
    return path


def test_client_models_give_their_rates_and_lengths(tmp_path: Path) -> None:
    path = write_clients(tmp_path / "clients.jsonl")
    source = ServeGen(path)
    assert (source.dropped_windows, source.dropped_clients, source.rate_rps) == (6, 1, 3.0)
    workload = build(path, duration_s=1800.0)
    assert len(workload.jobs) == pytest.approx(3.0 * 1800, rel=0.08)
    assert {b for _, b in lengths(workload)} == {7}
    inputs = np.array([a for a, _ in lengths(workload)])
    assert 100 <= inputs.min() <= inputs.max() <= 340
    assert np.median(inputs) == pytest.approx(215, rel=0.05)
    assert workload.notes["dropped_windows"] == 6
    scaled = build(path, duration_s=1800.0, rate_rps=12.0)
    assert len(scaled.jobs) == pytest.approx(12.0 * 1800, rel=0.05)
    steady = build(path, arrivals="poisson", rate_rps=5.0, duration_s=600.0)
    assert len(steady.jobs) == pytest.approx(3000, rel=0.1)
