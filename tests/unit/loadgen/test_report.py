"""Prompts of an exact length, and the figures of a run."""

from __future__ import annotations

import json
from dataclasses import replace
from typing import Any

import numpy as np
import pytest

from nexusengine.errors import ConfigError
from nexusengine.loadgen.items import WorkItem, items_of
from nexusengine.loadgen.prompts import Prompts, bodies
from nexusengine.loadgen.record import Record
from nexusengine.loadgen.report import summary, verdict
from nexusengine.sim.job import TraceBlocks, make_job
from nexusengine.sim.workload.build import Workload
from nexusengine.types import SLO, Verdict

LOOSE = SLO(1.0, 0.1)


def record(
    ttft_s: float = 0.5,
    tpot_s: float = 0.05,
    *,
    prompt: int = 10,
    tokens: int = 5,
    slo: SLO | None = LOOSE,
    slo_class: str | None = "standard",
    late_s: float = 0.0,
    **fields: Any,
) -> Record:
    """Intended at 100.0."""
    last_s = 100.0 + ttft_s + tpot_s * (tokens - 1)
    return Record(
        WorkItem(0.0, prompt, tokens, slo, slo_class),
        intended_s=100.0,
        sent_s=100.0 + late_s,
        first_s=100.0 + ttft_s,
        last_s=last_s,
        ended_s=last_s,
        output_tokens=tokens,
        status=200,
        **fields,
    )


def failed(error: str, status: int = 0, *, slo_class: str = "standard", prompt: int = 10) -> Record:
    item = WorkItem(0.0, prompt, 5, LOOSE, slo_class)
    return Record(item, 100.0, 100.0, ended_s=103.0, status=status, error=error)


def test_a_prompt_has_the_wanted_length_and_depends_on_seed_and_place_alone() -> None:
    prompts = Prompts(50_000, seed=1)
    first = prompts.token_ids(0, WorkItem(0.0, 300, 5))
    assert len(first) == 300
    assert first.min() >= 1000
    assert first.max() < 50_000
    np.testing.assert_array_equal(first, Prompts(50_000, seed=1).token_ids(0, WorkItem(9.0, 300, 1)))
    assert (first != prompts.token_ids(1, WorkItem(0.0, 300, 5))).any()
    assert (first != Prompts(50_000, seed=2).token_ids(0, WorkItem(0.0, 300, 5))).any()
    assert Prompts(97, seed=0).token_ids(0, WorkItem(0.0, 50, 1)).max() < 97


def test_prompts_with_equal_first_blocks_begin_alike_and_then_differ() -> None:
    prompts = Prompts(50_000, seed=1)
    one = prompts.token_ids(0, WorkItem(0.0, 100, 5, blocks=TraceBlocks((7, 8), 32, 64)))
    other = prompts.token_ids(1, WorkItem(0.0, 90, 5, blocks=TraceBlocks((7, 9), 32, 64)))
    assert (len(one), len(other)) == (100, 90)
    np.testing.assert_array_equal(one[:32], other[:32])
    assert (one[32:90] != other[32:90]).mean() > 0.9
    elsewhere = prompts.token_ids(1, WorkItem(0.0, 90, 5, blocks=TraceBlocks((7, 9), 32, 64, scope=1)))
    assert (one[:32] != elsewhere[:32]).any(), "ids of another session"
    assert len(prompts.token_ids(0, WorkItem(0.0, 40, 5, blocks=TraceBlocks((7, 8), 32, 64)))) == 40


def test_a_body_asks_for_exact_lengths_and_for_its_class_or_its_bounds() -> None:
    work = [WorkItem(0.0, 3, 7, SLO(1.5, 0.02), "gold"), WorkItem(0.0, 3, 7, SLO(1.5, 0.02, 9.0)), WorkItem(0.0, 3, 7)]
    prompts = Prompts(5000, 0)
    one, two, three = (json.loads(b) for b in bodies(work, prompts, "m", seed=40))
    assert one["prompt"] == prompts.token_ids(0, work[0]).tolist()
    assert (one["max_tokens"], one["ignore_eos"], one["stream"], one["model"], one["seed"]) == (7, True, True, "m", 40)
    assert (one["slo"], three["slo"]) == ("gold", "none")
    assert two["slo"] == {"ttft_ms": 1500.0, "tpot_ms": 20.0, "e2e_ms": 9000.0}
    numbers = json.loads(bodies(work[:1], prompts, None, seed=0, bounds=True)[0])
    assert numbers["slo"] == {"ttft_ms": 1500.0, "tpot_ms": 20.0}
    assert "model" not in numbers


def test_a_promise_is_judged_from_when_the_request_was_to_be_sent() -> None:
    assert verdict(record()) == Verdict(True, True)
    assert verdict(record(1.1, late_s=0.5)) == Verdict(False, False, "ttft")
    assert verdict(record(tpot_s=0.11)) == Verdict(False, False, "tpot")
    assert verdict(record(in_time=False)) == Verdict(True, False)
    assert verdict(record(in_time=False, nexus={"met_strict": True})) == Verdict(True, True)
    assert verdict(record(5.0, slo=None)) == Verdict(True, True)
    assert verdict(failed("http_429_overloaded", 429)) == Verdict(False, False, "refused")
    assert verdict(failed("timeout")) == Verdict(False, False, "unfinished")
    assert verdict(failed("broken_off", 200)) == Verdict(False, False, "failed")


def test_the_figures_are_of_all_that_was_offered() -> None:
    figures = summary(
        [
            record(0.2, prompt=1000),
            record(0.4, 0.06, slo_class="batch"),
            record(2.0, tokens=1),
            failed("http_429_overloaded", 429),
        ]
    )
    assert (figures["offered"], figures["completed"]) == (4, 3)
    assert figures["attainment"] == figures["attainment_strict"] == 0.5
    assert figures["attainment_by_class"] == {"batch": 1.0, "standard": pytest.approx(1 / 3, abs=1e-4)}
    assert figures["attainment_longest_decile"] == 1.0
    weights = [1005, 15, 11, 15]
    assert figures["attainment_token_weighted"] == pytest.approx((1005 + 15) / sum(weights), abs=1e-4)
    assert figures["missed"] == {"ttft": 1, "refused": 1}
    assert figures["errors"] == {"http_429_overloaded": 1}
    assert figures["ttft_ms"]["p50"] == 400.0
    assert figures["ttft_ms"]["mean"] == pytest.approx(866.6667)
    assert figures["tpot_ms"] == {"mean": 55.0, "p50": 55.0, "p90": 59.0, "p99": 59.9}, "none with one token"
    assert figures["goodput_tokens_per_s"] == pytest.approx(10 / 3.0, abs=1e-3)
    assert figures["worst_wait_s"] == 3.0, "the refused one waited for its answer"
    assert figures["output_tokens_per_s"] == pytest.approx(11 / 3.0, abs=1e-3)
    assert figures["server"] is None


def test_what_the_server_says_of_the_same_requests_stands_beside() -> None:
    nexus = {
        "met": True,
        "met_strict": True,
        "unattainable": False,
        "predicted_ttft_ms": 300.0,
        "ttft_ms": 400.0,
        "tpot_ms": None,
        "queue_ms": 5.0,
        "preemptions": 2,
        "worker": "w1",
    }
    server = summary([record(nexus=nexus), record(nexus=nexus | {"met": None, "unattainable": True})])["server"]
    assert (server["attainment"], server["unattainable"], server["predicted_ttft_off"]) == (1.0, 1, 0.25)
    assert (server["predicted_ttft"], server["predicted_ttft_off_p90"]) == (2, 0.25)
    assert (server["tpot_ms"]["p50"], server["queue_ms"]["p50"], server["by_worker"]) == (None, 5.0, {"w1": 2})


def test_answers_of_which_nothing_was_predicted_are_left_out_of_the_error() -> None:
    keys = ("met", "met_strict", "tpot_ms", "queue_ms", "worker")
    nexus = {**dict.fromkeys(keys), "unattainable": False, "preemptions": 0, "ttft_ms": 400.0}
    untold, told = nexus | {"predicted_ttft_ms": None}, nexus | {"predicted_ttft_ms": 440.0}
    server = summary([record(nexus=untold), record(nexus=told)])["server"]
    assert (server["predicted_ttft"], server["predicted_ttft_off"]) == (1, pytest.approx(0.1))
    server = summary([record(nexus=untold)])["server"]
    assert (server["predicted_ttft"], server["predicted_ttft_off"], server["predicted_ttft_off_p90"]) == (0, None, None)


def test_a_run_without_an_answer_has_figures_too() -> None:
    figures = summary([failed("connection"), failed("connection")])
    assert (figures["attainment"], figures["completed"], figures["output_tokens_per_s"]) == (0.0, 0, 0.0)
    assert figures["ttft_ms"] == dict.fromkeys(("mean", "p50", "p90", "p99"))
    assert figures["worst_wait_s"] == 3.0


def test_a_workload_is_sent_as_the_simulator_would_offer_it() -> None:
    blocks = TraceBlocks((1, 2), 512, 700)
    first = make_job("a", 0.5, 700, 9, slo=LOOSE, slo_class="gold", blocks=blocks)
    assert items_of(Workload((first,), 1.0, ("gold",))) == [WorkItem(0.5, 700, 9, LOOSE, "gold", blocks)]
    with pytest.raises(ConfigError, match="closed loop"):
        items_of(Workload((replace(first, then=first),), 1.0, ("gold",)))
