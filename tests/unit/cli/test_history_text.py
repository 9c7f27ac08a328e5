"""A request's history in sentences."""

from __future__ import annotations

from typing import Any

from nexusengine.cli.history_text import REASONS, request_lines
from nexusengine.scheduler.plan import Reason

STEP = {"tokens": 530, "sequences": 19, "predicted_ms": 48.25, "device_ms": 51.0, "notes": {"limit_ms": 50.0}}
HISTORY: dict[str, Any] = {
    "request_id": "cmpl-1",
    "worker": "w2",
    "class": "gold",
    "slo": {"ttft_ms": 500.0, "tpot_ms": 50.0, "e2e_ms": None},
    "priority": 3,
    "prompt_tokens": 700,
    "cached_tokens": 64,
    "output_tokens": 5,
    "preemptions": 1,
    "predicted_ttft_ms": 120.0,
    "unattainable": False,
    "scheduled_at_ms": 40.0,
    "first_token_at_ms": 90.0,
    "finished_at_ms": 300.0,
    "now_at_ms": 5000.0,
    "finish_reason": "length",
    "error": None,
    "met": True,
    "met_strict": False,
    "missed": None,
    "changes": [
        {"at_ms": 1.0, "step": 7, "reason": "wait_running_slot", "tokens": 0, "in_step": None},
        {"at_ms": 20.0, "step": 8, "reason": "wait_time", "tokens": 0, "in_step": STEP | {"notes": {}}},
        {"at_ms": 40.0, "step": 9, "reason": "admitted", "tokens": 512, "in_step": STEP},
        {"at_ms": 100.0, "step": 11, "reason": "decode", "tokens": 1, "in_step": STEP},
        {"at_ms": 150.0, "step": 12, "reason": "preempted", "tokens": 0, "in_step": None},
    ],
    "changes_left_off": 0,
}


def test_a_request_is_told_from_its_arrival_to_its_verdict() -> None:
    assert request_lines(HISTORY) == [
        "cmpl-1 on w2: 700 prompt tokens, 64 of them in the prefix cache; class gold: first token within 500 ms, "
        "50.0 ms a token, priority 3.",
        "      0.0 ms  arrives; its first token is expected after 120 ms",
        "      1.0 ms  step 7: waits: the most sequences run already",
        "     20.0 ms  step 8: waits: more work would make the step longer than the promise of a running request allows"
        ": 530 tokens in 19 sequences (predicted 48.2 ms, took 51.0 ms)",
        "     40.0 ms  step 9: gets KV blocks and begins its prompt: 512 tokens of 530 in 19 sequences (predicted "
        "48.2 ms, took 51.0 ms, allowed 50.0 ms)",
        "     90.0 ms  its first token is there",
        "    100.0 ms  step 11: generates a token in each step",
        "    150.0 ms  step 12: is preempted: its KV blocks are given to others; it is computed anew later",
        "    300.0 ms  ends (length) with 5 tokens, preempted once; its promise is kept, though not token by token",
    ]


def last(**changed: Any) -> str:
    return request_lines(HISTORY | {"preemptions": 0} | changed)[-1]


def test_every_end_has_its_words() -> None:
    assert last(met=False, missed="ttft").endswith("its promise is broken: the first token came too late")
    assert last(met=False, missed="tpot").endswith("its tokens came too slowly")
    assert last(met=None, slo=None).endswith("nothing was promised")
    assert last(finish_reason=None).endswith("5000.0 ms  has 5 tokens so far")
    assert last(finish_reason="error", error="overloaded", met=None).endswith("ends with an error (overloaded)")
    assert last(finish_reason="abort", met=None, preemptions=2).endswith("is aborted after 5 tokens, preempted 2 times")


def test_where_nothing_was_predicted_that_is_said() -> None:
    assert "nothing is predicted of its first token" in request_lines(HISTORY | {"predicted_ttft_ms": None})[1]


def test_what_is_special_is_said() -> None:
    lines = request_lines(HISTORY | {"unattainable": True, "changes_left_off": 9, "first_token_at_ms": 200.0})
    assert "cannot be kept here even if nothing else is served" in lines[2]
    assert "9 earlier changes" in lines[3]
    assert lines[-2] == "    200.0 ms  its first token is there"
    with_slo = HISTORY | {"slo": {"ttft_ms": 20_000.0, "tpot_ms": 50.0, "e2e_ms": 60_000.0}}
    assert "first token within 20.0 s, 50.0 ms a token, all within 60.0 s" in request_lines(with_slo)[0]


def test_every_reason_a_policy_can_give_has_words() -> None:
    assert {reason.name.lower() for reason in Reason} <= set(REASONS)
