"""Why the router answers a request with an error, before or instead of a worker's answer. PURE."""

from __future__ import annotations

from nexusengine.errors import DeadlineExceeded, InvalidRequest, NexusError, Overloaded, Unavailable
from nexusengine.router import checks
from nexusengine.router.ledger import Entry, Ledger
from nexusengine.router.stats import FinishRate
from nexusengine.types import EngineRequest


def refusal_on_arrival(
    request: EngineRequest, ledger: Ledger, finish_rate: FinishRate, *, draining: bool, max_held: int
) -> NexusError | None:
    """Why a request is not taken; None if it is."""
    held = ledger.held
    if (problem := checks.problem_of_request(request)) is not None:
        return InvalidRequest(f"the request cannot be served: {problem}")
    if request.request_id in ledger:
        return InvalidRequest(f"a request with id {request.request_id!r} is being served")
    if draining:
        return Unavailable("the server is shutting down", retry_after_s=5.0)
    if held >= max_held:
        return Overloaded(f"{held} requests are held already", retry_after_s=finish_rate.drain_s(held))
    return None


def waited_too_long(entry: Entry, retry_after_s: float, now: float) -> Overloaded:
    """Why a request that waited as long as its class allows is given up on a saturated cluster."""
    return Overloaded(
        f"no token after {now - entry.placement.arrival_s:.1f} s, and others that waited as long were not served in "
        "time either",
        retry_after_s=retry_after_s,
    )


def past_deadline(entry: Entry) -> DeadlineExceeded:
    """Why a request that ran into its time limit ends."""
    limit_s = entry.placement.deadline_s - entry.placement.arrival_s
    return DeadlineExceeded(f"not finished within {limit_s:.1f} s of its arrival")
