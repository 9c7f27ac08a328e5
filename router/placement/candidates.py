"""What all placement policies share: which workers may take a request, and the rotation of ties. PURE."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence

from nexusengine.errors import ContextTooLong
from nexusengine.request_limits import too_long
from nexusengine.router.placement.policy import Decision, Hold, Place, PlacementRequest, Refuse, WorkerView
from nexusengine.wire import WorkerState


def candidates(request: PlacementRequest, workers: Sequence[WorkerView]) -> list[WorkerView]:
    """The workers that may take the request now.

    Those that accept requests and can hold it, without those in slow start unless all are.
    """
    able = [w for w in workers if w.accepts and w.fits(request)]
    return [w for w in able if not w.slow_start] or able


def why_none(request: PlacementRequest, workers: Sequence[WorkerView]) -> Hold | Refuse:
    """The answer when no worker may take it: refused if none ever could, else held."""
    fitting = [w for w in workers if w.fits(request)]
    if workers and not fitting:
        longest = max(w.info.max_model_len for w in workers)
        return Refuse(ContextTooLong.code, too_long(request.prompt_tokens, request.max_tokens, longest))
    ejected = sorted({w.ejected for w in fitting if w.state is WorkerState.READY and w.ejected})
    why = "; ".join(ejected) or "no worker is ready"
    return Hold(why, everyone=len(fitting) == len(workers))


class Rotation:
    """Ties go round: of several equal choices the one that has waited longest for its turn is taken."""

    def __init__(self) -> None:
        self._turn = 0
        self._turn_of: dict[str, int] = {}

    def last(self, worker_id: str) -> int:
        """When the worker was last taken, as a number that rises; 0 if never."""
        return self._turn_of.get(worker_id, 0)

    def took(self, worker_id: str) -> None:
        """The worker was taken."""
        self._turn += 1
        self._turn_of[worker_id] = self._turn

    def least(self, workers: Sequence[WorkerView], cost: Callable[[WorkerView], float]) -> WorkerView:
        """Take the worker of least cost. workers must not be empty."""
        best = min(workers, key=lambda w: (cost(w), self.last(w.worker_id)))
        self.took(best.worker_id)
        return best


class ServesLate:
    """Base of policies that refuse nobody for being late."""

    def observe(self, in_time: bool) -> None:
        """Nothing is learned."""
        del in_time

    def saturated(self, now: float) -> bool:
        """Never: requests are served late."""
        del now
        return False


class Stateless(ServesLate, ABC):
    """Base of policies that keep nothing of the views: they choose among the candidates of the moment."""

    uses_prefixes = False

    def __init__(self) -> None:
        self._rotation = Rotation()

    def prepare(self, workers: Sequence[WorkerView], now: float) -> None:
        """Nothing to do."""
        del workers, now

    def place(self, request: PlacementRequest, workers: Sequence[WorkerView], now: float) -> Decision:
        """Choose among those that may take it now."""
        able = candidates(request, workers)
        return self._choose(request, able) if able else why_none(request, workers)

    @abstractmethod
    def _choose(self, request: PlacementRequest, able: list[WorkerView]) -> Place:
        """One of `able`, which is not empty."""
