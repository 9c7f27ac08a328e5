"""/debug: what the workers did in their newest steps, and what became of one request. Only with --debug-endpoints:
it shows lengths and times of everybody's requests, never their text."""

from __future__ import annotations

import time
from typing import Any

from starlette.requests import Request
from starlette.responses import JSONResponse, Response
from starlette.routing import Route

from nexusengine.errors import InvalidRequest, NotFound
from nexusengine.server.state import ServerState
from nexusengine.server.verdict import ms
from nexusengine.slo.due import judge
from nexusengine.types import SLO, Verdict
from nexusengine.wire import MAX_STEPS_IN_ANSWER, RequestHistory, StepHistory

_DEFAULT_STEPS = 50


async def steps(request: Request) -> Response:
    """The newest `last` steps of each worker, oldest first. Times in milliseconds; age_ms since a step began."""
    state: ServerState = request.app.state.server
    text = request.query_params.get("last", str(_DEFAULT_STEPS))
    if not (text.isascii() and text.isdigit() and 1 <= int(text[:9]) <= MAX_STEPS_IN_ANSWER):
        raise InvalidRequest(f"last must be a whole number from 1 to {MAX_STEPS_IN_ANSWER}, got {text!r}", param="last")
    answers = await state.serving_engine().backend.ask(last_steps=int(text))
    now_s = time.monotonic()
    return JSONResponse({"workers": {a.worker_id: [_step(s, now_s) for s in a.steps] for a in answers}})


async def one_request(request: Request) -> Response:
    """What is remembered of a request, by the `id` of its reply. Of one that went to a second worker, both histories;
    the newest first."""
    state: ServerState = request.app.state.server
    request_id = request.path_params["request_id"]
    answers = await state.serving_engine().backend.ask(request_id=request_id)
    found = sorted((a.request for a in answers if a.request), key=lambda h: h.scheduled_s or 0.0, reverse=True)
    if not found:
        raise NotFound(f"no worker remembers a request {request_id[:128]!r}", param="request_id")
    return JSONResponse({"histories": [_history(h) for h in found]})


def _step(step: StepHistory, now_s: float) -> dict[str, Any]:
    return {
        "step": step.step,
        "age_ms": ms(now_s - step.started_s),
        "predicted_ms": ms(step.predicted_s),
        "upper_ms": ms(step.upper_s),
        "device_ms": ms(step.device_s),
        "scheduler_ms": ms(step.scheduler_s),
        "tokens": step.tokens,
        "sequences": step.sequences,
        "prefills": step.prefills,
        "prefill_attention": step.prefill_attention,
        "decode_kv_tokens": step.decode_kv_tokens,
        "running": step.running,
        "waiting": step.waiting,
        "preempted": step.preempted,
        "reasons": step.reasons,
        "notes": step.notes,
    }


def _history(h: RequestHistory) -> dict[str, Any]:
    """at_ms: since the request arrived at the server."""

    def at(instant_s: float | None) -> float | None:
        return None if instant_s is None else ms(instant_s - h.arrival_s)

    verdict, now_s = _verdict(h), time.monotonic()
    steps = {s.step: _step(s, now_s) for s in h.steps}
    return {
        "request_id": h.request_id,
        "worker": h.worker_id,
        "class": h.slo_class,
        "slo": None if h.ttft_s is None else {"ttft_ms": ms(h.ttft_s), "tpot_ms": ms(h.tpot_s), "e2e_ms": ms(h.e2e_s)},
        "priority": h.priority,
        "prompt_tokens": h.prompt_tokens,
        "cached_tokens": h.cached_tokens,
        "output_tokens": h.output_tokens,
        "preemptions": h.preemptions,
        "predicted_ttft_ms": ms(h.predicted_ttft_s),
        "unattainable": h.unattainable,
        "scheduled_at_ms": at(h.scheduled_s),
        "first_token_at_ms": at(h.first_token_s),
        "finished_at_ms": at(h.finished_s),
        "now_at_ms": at(h.now_s),
        "finish_reason": h.finish_reason,
        "error": h.error,
        "met": verdict.met if verdict else None,
        "met_strict": verdict.strict_met if verdict else None,
        "missed": verdict.missed if verdict else None,
        "changes": [
            {"at_ms": at(c.at_s), "step": c.step, "reason": c.reason, "tokens": c.tokens, "in_step": steps.get(c.step)}
            for c in h.changes
        ],
        "changes_left_off": h.changes_left_off,
    }


def _verdict(h: RequestHistory) -> Verdict | None:
    """Of an answer that is complete and was promised something."""
    if h.ttft_s is None or h.tpot_s is None or h.finish_reason not in ("stop", "length"):
        return None
    if h.first_token_s is None or h.finished_s is None:
        return None
    return judge(
        SLO(h.ttft_s, h.tpot_s, h.e2e_s),
        arrival_s=h.arrival_s,
        first_token_s=h.first_token_s,
        last_token_s=h.finished_s,
        output_tokens=h.output_tokens,
        strict=h.strict,
    )


routes = [Route("/debug/steps", steps), Route("/debug/requests/{request_id}", one_request)]
