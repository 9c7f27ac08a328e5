"""The history of a request, as /debug/requests gives it, in sentences."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

REASONS = {
    "none": "nothing is known of what it does",
    "decode": "generates a token in each step",
    "prefill": "computes the next chunk of its prompt",
    "admitted": "gets KV blocks and begins its prompt",
    "wait_tokens": "waits: the step has its most tokens",
    "wait_blocks": "waits: too few KV blocks are free",
    "wait_running_slot": "waits: the most sequences run already",
    "wait_order": "waits: others go first",
    "preempted": "is preempted: its KV blocks are given to others; it is computed anew later",
    "relegated": "is relegated behind all others: its promise cannot be kept any more",
    "refused": "is refused",
    "wait_time": "waits: more work would make the step longer than the promise of a running request allows",
    "wait_tpot": "waits: with it every step would come too near to the tightest TPOT promised",
    "deferred": "is deferred: serving it in its turn would make more requests late",
    "aged": "computes in the share kept for requests that wait far beyond their turn",
    "backfill": "computes in what the others left of the step",
    "wait_coalesce": "waits: decodes run alone, so that a later step has time for a larger prefill chunk",
}
"""By the name of its scheduler.plan.Reason, in lower case."""
_MISSED = {
    "ttft": "the first token came too late",
    "tpot": "its tokens came too slowly",
    "e2e": "its end came too late",
}


def request_lines(history: Mapping[str, Any]) -> list[str]:
    """One line a fact, in order of time."""
    return [_who(history), *_timeline(history), _end(history)]


def _who(h: Mapping[str, Any]) -> str:
    wanted, slo = "nothing was promised", h["slo"]
    if slo is not None:
        wanted = f"class {h['class']}: first token within {_ms(slo['ttft_ms'])}, {_ms(slo['tpot_ms'])} a token"
        if slo["e2e_ms"] is not None:
            wanted += f", all within {_ms(slo['e2e_ms'])}"
    priority = f", priority {h['priority']}" if h["priority"] else ""
    cached = f", {h['cached_tokens']} of them in the prefix cache" if h["cached_tokens"] else ""
    return f"{h['request_id']} on {h['worker']}: {h['prompt_tokens']} prompt tokens{cached}; {wanted}{priority}."


def _timeline(h: Mapping[str, Any]) -> Iterator[str]:
    yield _at(0.0, f"arrives; {_expected(h['predicted_ttft_ms'])}")
    if h["unattainable"]:
        expected = "by the predictions so far its promise cannot be kept here even if nothing else is served"
        yield _at(0.0, f"{expected}; it is served best effort")
    if h["changes_left_off"]:
        yield f"{'':>12}  ({h['changes_left_off']} earlier changes are left off)"
    first_ms = h["first_token_at_ms"]
    shown = first_ms is None
    for change in h["changes"]:
        if not shown and change["at_ms"] >= first_ms:
            shown = True
            yield _at(first_ms, "its first token is there")
        yield _at(change["at_ms"], f"step {change['step']}: {_words(change['reason'])}{_of_step(change)}")
    if not shown:
        yield _at(first_ms, "its first token is there")


def _expected(predicted_ttft_ms: float | None) -> str:
    if predicted_ttft_ms is None:
        return "nothing is predicted of its first token: too little is known of such steps, or it waits for others"
    return f"its first token is expected after {_ms(predicted_ttft_ms)}"


def _of_step(change: Mapping[str, Any]) -> str:
    """How much of it, and of what step; that is said where a chunk was computed, or time was what was short."""
    step = change["in_step"]
    if change["tokens"] <= 1 and change["reason"] != "wait_time":
        return ""
    tokens = f": {change['tokens']} tokens" if change["tokens"] else ""
    if step is None:
        return tokens
    of = f" of {step['tokens']}" if tokens else f": {step['tokens']} tokens"
    limit = step["notes"].get("limit_ms")
    allowed = f", allowed {_ms(limit)}" if limit is not None else ""
    took = f"predicted {_ms(step['predicted_ms'])}, took {_ms(step['device_ms'])}"
    return f"{tokens}{of} in {step['sequences']} sequences ({took}{allowed})"


def _end(h: Mapping[str, Any]) -> str:
    preempted = f", preempted {_times(h['preemptions'])}" if h["preemptions"] else ""
    if h["finish_reason"] is None:
        return _at(h["now_at_ms"], f"has {h['output_tokens']} tokens so far{preempted}")
    if h["finish_reason"] == "error":
        return _at(h["finished_at_ms"], f"ends with an error ({h['error']}){preempted}")
    if h["finish_reason"] == "abort":
        return _at(h["finished_at_ms"], f"is aborted after {h['output_tokens']} tokens{preempted}")
    return _at(
        h["finished_at_ms"], f"ends ({h['finish_reason']}) with {h['output_tokens']} tokens{preempted}; {_verdict(h)}"
    )


def _verdict(h: Mapping[str, Any]) -> str:
    if h["met"] is None:
        return "nothing was promised"
    if h["met"]:
        return "its promise is kept" + ("" if h["met_strict"] else ", though not token by token")
    return f"its promise is broken: {_MISSED[h['missed']]}"


def _words(reason: str) -> str:
    return REASONS.get(reason, reason.replace("_", " "))


def _times(count: int) -> str:
    return "once" if count == 1 else f"{count} times"


def _at(ms: float, text: str) -> str:
    return f"{ms:>9.1f} ms  {text}"


def _ms(ms: float) -> str:
    return f"{ms / 1e3:.1f} s" if ms >= 10_000 else f"{ms:.0f} ms" if ms >= 100 else f"{ms:.1f} ms"
