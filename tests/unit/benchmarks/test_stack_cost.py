"""The benchmark of server and router: what it sends and how it judges; how long answers take is no test."""

from __future__ import annotations

import argparse
import asyncio
from dataclasses import replace

import pytest

from benchmarks.stack_cost import Refused, counted, figures_of, make_items, summary_of, without_stack
from nexusengine.loadgen.items import WorkItem
from nexusengine.loadgen.record import Record


def record(send_at_s: float, ttft_ms: float, error: str | None = None) -> Record:
    item = WorkItem(send_at_s, prompt_tokens=10, output_tokens=1)
    return Record(
        item, 100.0 + send_at_s, sent_s=100.001 + send_at_s, first_s=100.0 + send_at_s + 1e-3 * ttft_ms, error=error
    )


def test_what_comes_before_the_server_is_warm_does_not_count() -> None:
    figures = figures_of([record(0.0, 900.0), record(4.0, 1.0), record(5.0, 3.0)])
    assert figures["p50"] == pytest.approx(2.0)
    assert figures["late_p99"] == pytest.approx(1.0)


def test_a_request_without_a_complete_answer_ends_the_benchmark() -> None:
    with pytest.raises(Refused, match=r"at 1.000 s: overloaded"):
        counted([record(4.0, 1.0), record(1.0, 1.0, "overloaded")])


def test_the_median_round_is_judged() -> None:
    rounds = [
        {"without": {"p50": 1.0, "p99": 2.0}, "with": {"p50": 1.0 + added, "p99": 5.0}} for added in (1.5, 80.0, 0.5)
    ]
    found = summary_of(rounds)
    assert found["added_ms"]["p50"] == pytest.approx([1.5, 80.0, 0.5])
    assert found["added_median_ms"] == pytest.approx({"p50": 1.5, "p99": 3.0})
    assert found["within"]
    assert not summary_of(rounds[1:2])["within"]


def test_an_engine_alone_answers_every_request_in_full() -> None:
    args = argparse.Namespace(lengths="input=20..40,output=3", rate=20.0, duration=1.0, seed=1)
    items = [replace(i, send_at_s=i.send_at_s / 20) for i in make_items(args)[:20]]
    records = asyncio.run(without_stack(items, "emulated:instant", seed=1))
    assert [r.output_tokens for r in records] == [3] * len(items)
    assert all(r.completed and r.first_s > r.intended_s for r in records)
