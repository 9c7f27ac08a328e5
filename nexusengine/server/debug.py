"""The routes of /debug: what the workers did in their newest steps, and what became of one request.

Only with --debug-endpoints: it shows lengths and times of everybody's requests, never their text.
"""

from __future__ import annotations

import math
import time
from typing import Any

import msgspec
from starlette.requests import Request
from starlette.responses import JSONResponse, Response
from starlette.routing import Route

from nexusengine.errors import InvalidRequest, NotFound
from nexusengine.server.state import ServerState
from nexusengine.server.verdict import ms, slo_in_ms
from nexusengine.slo.due import judge
from nexusengine.slo.resolve import NONE
from nexusengine.types import Verdict
from nexusengine.wire import MAX_STEPS_IN_REPLY, RequestHistory, RequestRecord, StepRecord

_DEFAULT_STEPS = 50


async def steps(request: Request) -> Response:
    """The newest `last` steps of each worker, oldest first. Times in milliseconds; age_ms since a step began."""
    state: ServerState = request.app.state.server
    text = request.query_params.get("last", str(_DEFAULT_STEPS))
    if not (text.isascii() and text.isdigit() and 1 <= int(text[:9]) <= MAX_STEPS_IN_REPLY):
        raise InvalidRequest(f"last must be a whole number from 1 to {MAX_STEPS_IN_REPLY}, got {text!r}", param="last")
    replies = await state.serving_engine().backend.ask(last_steps=int(text))
    now_s = time.monotonic()
    return JSONResponse({"workers": {r.worker_id: [_step(s, now_s) for s in r.steps] for r in replies}})


async def one_request(request: Request) -> Response:
    """The histories of a request, by the `id` of its reply; the newest first, if it had two workers."""
    state: ServerState = request.app.state.server
    request_id = request.path_params["request_id"]
    replies = await state.serving_engine().backend.ask(request_id=request_id)
    found = [reply.request for reply in replies if reply.request is not None]
    found.sort(key=lambda h: h.record.timings.scheduled_s or 0.0, reverse=True)
    if not found:
        raise NotFound(f"no worker remembers a request {request_id[:128]!r}", param="request_id")
    return JSONResponse({"histories": [_history(h) for h in found]})


def _step(step: StepRecord, now_s: float) -> dict[str, Any]:
    """The fields of a step, seconds as milliseconds, and its age in place of its timestamp; infinite notes are null."""
    fields = msgspec.structs.asdict(step)
    fields["notes"] = {name: value if math.isfinite(value) else None for name, value in step.notes.items()}
    age_s = now_s - fields.pop("started_s")
    durations = {f"{name[:-2]}_ms": ms(fields.pop(name)) for name in list(fields) if name.endswith("_s")}
    return {"step": fields.pop("step"), "age_ms": ms(age_s), **durations, **fields}


def _history(h: RequestHistory) -> dict[str, Any]:
    """at_ms: since the request arrived at the server."""
    r, t = h.record, h.record.timings

    def at(timestamp_s: float | None) -> float | None:
        return None if timestamp_s is None else ms(timestamp_s - t.arrival_s)

    verdict, now_s = _verdict(r), time.monotonic()
    steps = {s.step: _step(s, now_s) for s in h.steps}
    return {
        "request_id": r.request_id,
        "worker": r.service.worker,
        "class": r.slo_class or NONE,
        "slo": slo_in_ms(r.slo),
        "priority": r.priority,
        "prompt_tokens": r.prompt_tokens,
        "cached_tokens": r.cached_tokens,
        "output_tokens": t.output_tokens,
        "preemptions": r.preemptions,
        "predicted_ttft_ms": ms(r.service.predicted_ttft_s),
        "unattainable": r.service.unattainable,
        "scheduled_at_ms": at(t.scheduled_s),
        "first_token_at_ms": at(t.first_token_s),
        "finished_at_ms": at(t.finished_s),
        "now_at_ms": at(h.now_s),
        "finish_reason": r.finish_reason,
        "error": r.error,
        "met": verdict and verdict.met,
        "met_strict": verdict and verdict.strict_met,
        "missed": verdict and verdict.missed,
        "changes": [
            {"at_ms": at(c.at_s), "step": c.step, "reason": c.reason, "tokens": c.tokens, "in_step": steps.get(c.step)}
            for c in h.changes
        ],
        "changes_left_off": h.changes_left_off,
    }


def _verdict(r: RequestRecord) -> Verdict | None:
    """Whether the SLO of a reply that is complete was met; None without one."""
    t = r.timings
    if r.slo is None or r.finish_reason not in ("stop", "length") or t.first_token_s is None or t.finished_s is None:
        return None
    return judge(
        r.slo,
        arrival_s=t.arrival_s,
        first_token_s=t.first_token_s,
        last_token_s=t.finished_s,
        output_tokens=t.output_tokens,
        strict=r.service.strict,
    )


routes = [Route("/debug/steps", steps), Route("/debug/requests/{request_id}", one_request)]
