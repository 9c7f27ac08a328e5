"""The newest placements and what each was decided by, for `/debug/placements` and for tests. PURE."""

from __future__ import annotations

from collections import deque
from dataclasses import dataclass

from nexusengine.router.placement.policy import Decision, Hold, Place, PlacementRequest

KEPT = 4096


@dataclass(frozen=True, slots=True)
class Placement:
    """One answer of the policy. at_s: monotonic instant."""

    at_s: float
    request: PlacementRequest
    decision: Decision

    def as_dict(self) -> dict[str, object]:
        """Names and plain values, for JSON."""
        r, d = self.request, self.decision
        told: dict[str, object] = {
            "at_s": self.at_s,
            "request_id": r.request_id,
            "prompt_tokens": r.prompt_tokens,
            "waited_s": self.at_s - r.arrival_s,
            "decision": type(d).__name__.lower(),
            "reason": d.reason,
        }
        if isinstance(d, Place):
            told |= {"worker": d.worker_id, "runner_up": d.runner_up, "first_token_in_s": d.first_token_in_s}
            told |= {"cached_tokens": r.cached_tokens.get(d.worker_id, 0), "numbers": dict(d.numbers)}
        elif isinstance(d, Hold):
            told["until_s"] = d.until_s
        else:
            told |= {"code": d.code, "retry_after_s": d.retry_after_s}
        return told


class PlacementTrace:
    """A ring of the newest placements. A request that is held is entered once for each different reason in a row."""

    def __init__(self, kept: int = KEPT) -> None:
        self._ring: deque[Placement] = deque(maxlen=kept)
        self._held: dict[str, str] = {}

    def add(self, at_s: float, request: PlacementRequest, decision: Decision) -> None:
        if isinstance(decision, Hold):
            if self._held.get(request.request_id) == decision.reason:
                return
            if len(self._held) >= KEPT:
                self._held.clear()
            self._held[request.request_id] = decision.reason
        else:
            self._held.pop(request.request_id, None)
        self._ring.append(Placement(at_s, request, decision))

    def newest(self, count: int = 100, request_id: str | None = None) -> list[Placement]:
        """Newest first; of one request if its id is given."""
        chosen = (p for p in reversed(self._ring) if request_id is None or p.request.request_id == request_id)
        return [p for _, p in zip(range(count), chosen, strict=False)]
