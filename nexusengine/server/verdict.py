"""The `nexus` object of a reply: its SLO, how fast it came, and whether the SLO was met."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from starlette.requests import Request

from nexusengine.config import parse_bool
from nexusengine.errors import Cancelled, DeadlineExceeded, InvalidRequest, Overloaded
from nexusengine.slo.resolve import NONE
from nexusengine.types import SLO, Missed, RequestOutput

VERDICT_HEADER = "x-nexus-verdict"


def wants_verdict(request: Request, default: bool) -> bool:
    """Whether the header asks for a verdict, else `default`. Raises InvalidRequest naming the header."""
    text = request.headers.get(VERDICT_HEADER)
    if text is None:
        return default
    try:
        return parse_bool(text.strip())
    except ValueError as error:
        raise InvalidRequest(f"{VERDICT_HEADER}: {error}", param=VERDICT_HEADER) from None


def all_headers(request: Request) -> Mapping[str, Sequence[str]]:
    """Every value of each header that speaks of an SLO, by lower-case name."""
    found: dict[str, list[str]] = {}
    for name, value in request.headers.items():
        if name.startswith("x-slo-"):
            found.setdefault(name, []).append(value)
    return found


def nexus(output: RequestOutput) -> dict[str, Any]:
    """The verdict on a generation, from its last output.

    Times in milliseconds, null where there is none; met, met_strict and missed are null without an SLO.
    """
    timings, service, verdict = output.timings, output.service, output.verdict
    return {
        "request_id": output.request_id,
        "class": output.slo_class or NONE,
        "slo": slo_in_ms(output.slo),
        "predicted_ttft_ms": ms(service.predicted_ttft_s if service else None),
        "ttft_ms": ms(timings.ttft_s if timings else None),
        "tpot_ms": ms(timings.tpot_s if timings else None),
        "queue_ms": ms(timings.queue_s if timings else None),
        "e2e_ms": ms(timings.e2e_s if timings else None),
        "worker": service.worker if service else None,
        "preemptions": output.preemptions,
        "cached_tokens": output.cached_tokens,
        "unattainable": service.unattainable if service else False,
        "met": verdict.met if verdict else None,
        "met_strict": verdict.strict_met if verdict else None,
        "missed": verdict.missed if verdict else None,
    }


def missed_by(error: Exception) -> Missed | None:
    """The verdict of a generation that ended with this error; None if the request itself was wrong."""
    if isinstance(error, InvalidRequest):
        return None
    if isinstance(error, Overloaded):
        return "refused"
    return "unfinished" if isinstance(error, DeadlineExceeded | Cancelled) else "failed"


def of_all(verdicts: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """The verdict shown for several choices: the first that missed its SLO, else the first."""
    return next((v for v in verdicts if v["met"] is False), verdicts[0])


def slo_in_ms(slo: SLO | None) -> dict[str, float | None] | None:
    if slo is None:
        return None
    return {"ttft_ms": ms(slo.ttft_s), "tpot_ms": ms(slo.tpot_s), "e2e_ms": ms(slo.e2e_s)}


def ms(seconds: float | None) -> float | None:
    return None if seconds is None else round(1e3 * seconds, 3)
