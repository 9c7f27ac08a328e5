"""Verdicts and figures of a simulation, against numbers worked out by hand."""

from __future__ import annotations

import json
import math
from dataclasses import replace

import numpy as np
import pytest

from nexusengine.sim.cluster import Outcome
from nexusengine.sim.engine import Ended
from nexusengine.sim.job import make_job
from nexusengine.sim.report import report, rounded_numbers
from nexusengine.sim.verdicts import longest_tenth, tabulate, verdict
from nexusengine.types import SLO
from tests.sim.clusters import QUIET, make_cluster, make_jobs


def outcome(
    i: int, prompt: int, output: int, first_s: float, last_s: float, *, name: str = "a", error: str | None = None
) -> Outcome:
    """Arrives at i seconds with a promise of 1 s and 0.1 s a token; instants count from its arrival."""
    job = make_job(f"r{i}", float(i), prompt, output, slo=SLO(1.0, 0.1), slo_class=name)
    ended = None if error else Ended(job, i + last_s, i + first_s, output_tokens=output, strict=True)
    return Outcome(job, i + first_s, i + last_s, ended, error, "w0")


def test_a_promise_is_kept_or_missed_for_a_reason() -> None:
    assert verdict(outcome(0, 10, 11, 1.0, 2.0)).missed is None
    assert verdict(outcome(0, 10, 11, 1.01, 2.0)).missed == "ttft"
    assert verdict(outcome(0, 10, 11, 0.5, 1.51)).missed == "tpot"
    for error, missed in (
        ("overloaded", "refused"),
        ("context_length_exceeded", "refused"),
        ("worker_lost", "failed"),
        ("deadline_exceeded", "unfinished"),
        ("unfinished", "unfinished"),
    ):
        assert verdict(outcome(0, 10, 11, math.nan, math.nan, error=error)).missed == missed


def test_a_request_of_one_token_has_no_tpot_and_one_without_promise_keeps_it() -> None:
    assert verdict(outcome(0, 10, 1, 0.5, 0.5)).met
    no_slo = outcome(0, 10, 5, 50.0, 90.0)
    job = replace(no_slo.job, request=replace(no_slo.job.request, slo=None))
    assert verdict(replace(no_slo, job=job)).met
    table = tabulate([outcome(0, 10, 1, 0.5, 0.5)], 10.0)
    assert np.isnan(table.tpot_s).all()


def test_waits_of_those_who_got_nothing_count_to_their_end() -> None:
    rows = [
        outcome(0, 10, 5, 3.0, 3.2),
        outcome(1, 10, 5, math.nan, 4.0, error="overloaded"),
        outcome(2, 10, 5, math.nan, math.nan, error="unfinished"),
    ]
    assert tabulate(rows, 20.0).waited_s.tolist() == [3.0, 4.0, 18.0]


def test_the_longest_tenth_is_at_least_one_request() -> None:
    assert longest_tenth(np.array([5])).tolist() == [0]
    assert longest_tenth(np.array([5, 9, 7])).tolist() == [1]
    assert sorted(longest_tenth(np.arange(40)[::-1]).tolist()) == [0, 1, 2, 3]
    assert longest_tenth(np.array([3] * 20)).tolist() == [18, 19]


def test_figures_are_what_they_are_by_hand() -> None:
    cluster = make_cluster(1)
    cluster.run(make_jobs(5, 0.1))
    rows = [outcome(i, 100 + i, 11, 0.2, 1.1, name="a" if i % 2 else "b") for i in range(16)]
    rows += [
        outcome(16, 500, 11, 2.0, 3.0, name="a"),
        outcome(17, 50, 11, math.nan, 17.5, name="b", error="overloaded"),
    ]
    rows += [outcome(18, 400, 11, 0.4, 3.4, name="a"), outcome(19, 10, 11, 0.2, 1.1, name="b")]
    m = report(cluster, rows, 20.0)
    assert (m["offered"], m["completed"], m["refused"]) == (20, 19, 1)
    assert m["attainment"] == m["attainment_strict"] == 0.85
    assert m["missed"] == {"ttft": 1, "refused": 1, "tpot": 1}
    assert m["attainment_by_class"] == {"a": 0.8, "b": 0.9}
    assert m["attainment_longest_decile"] == 0.0
    assert m["attainment_by_prompt_decile"] == [0.5, *[1.0] * 8, 0.0]
    prompt_tokens = sum(100 + i for i in range(16)) + 10
    total = prompt_tokens + 500 + 50 + 400 + 20 * 11
    assert m["attainment_token_weighted"] == pytest.approx((prompt_tokens + 17 * 11) / total, rel=1e-4)
    assert m["ttft_ms"]["p50"] == 200.0
    assert m["ttft_ms"]["mean"] == pytest.approx((17 * 200 + 2000 + 400) / 19, rel=1e-4)
    assert m["tpot_ms"]["p99"] == pytest.approx(np.percentile([90.0] * 17 + [100.0, 300.0], 99), rel=1e-4)
    assert m["e2e_ms"]["p50"] == 1100.0
    assert m["output_tokens_per_s"] == pytest.approx(19 * 11 / 21.4, rel=1e-4)
    assert m["worst_wait_s"] == 17.5  # of the one that was refused after so long
    assert m["offered_rps"] == 1.0


def test_a_report_is_plain_json_and_adds_up() -> None:
    jobs = make_jobs(200, 0.01)
    cluster = make_cluster(3, settings=replace(QUIET, noise=True))
    m = report(cluster, cluster.run(jobs), jobs[-1].request.arrival_s)
    assert json.loads(json.dumps(m)) == m
    assert sum(w["completed"] for w in m["workers"]) == m["completed"]
    assert sum(w["generated_tokens"] for w in m["workers"]) == sum(j.output_tokens for j in jobs)
    assert sum(w["steps"] for w in m["workers"]) == m["steps"]
    assert all(0 < w["busy"] <= 1 and 0 < w["kv_peak"] <= 1 for w in m["workers"])
    assert sum(m["missed"].values()) == round((1 - m["attainment"]) * m["offered"])
    assert m["scheduler_ms_p50"] > 0
    assert m["router_ms_p50"] > 0


def test_a_report_of_nothing_completed_has_no_latencies() -> None:
    jobs = make_jobs(5, 0.01)
    cluster = make_cluster(1, faults=["join:0:50"], timeout_s=1.0)
    m = report(cluster, cluster.run(jobs), 1.0)
    assert (m["completed"], m["attainment"], m["ttft_ms"]["p50"], m["output_tokens_per_s"]) == (0, 0.0, None, None)


def test_numbers_are_rounded_to_six_digits() -> None:
    rounded = rounded_numbers({"a": [1 / 3, np.float64(2e6 / 3), math.inf], "b": np.int64(3), "c": "x", "d": True})
    assert rounded == {"a": [0.333333, 666667.0, None], "b": 3, "c": "x", "d": True}
