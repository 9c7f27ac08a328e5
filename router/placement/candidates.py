"""What all placement policies share: which workers may take a request, and the rotation of ties. PURE."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from nexusengine.errors import ContextTooLong
from nexusengine.router.placement.policy import Hold, PlacementRequest, Refuse, WorkerView
from nexusengine.wire import WorkerState


def candidates(request: PlacementRequest, workers: Sequence[WorkerView]) -> list[WorkerView] | Hold | Refuse:
    """The workers that may take it now: those that are ready, not barred, and not warming up unless all others are."""
    able = [w for w in workers if w.takes and w.fits(request)]
    if not able:
        return why_none(request, workers)
    return [w for w in able if not w.warming] or able


def why_none(request: PlacementRequest, workers: Sequence[WorkerView]) -> Hold | Refuse:
    """The answer when no worker may take it: refused if none ever could, else held."""
    fitting = [w for w in workers if w.fits(request)]
    if workers and not fitting:
        longest = max(w.info.max_model_len for w in workers)
        asked = f" and {request.max_tokens} output tokens were asked for" if request.max_tokens else ""
        return Refuse(
            ContextTooLong.code,
            f"the prompt has {request.prompt_tokens} tokens{asked}, but prompt and output together can have at "
            f"most {longest}",
        )
    barred = sorted({w.barred for w in fitting if w.state is WorkerState.READY and w.barred})
    why = "; ".join(barred) or "no worker is ready"
    return Hold(request.deadline_s, why, everyone=len(fitting) == len(workers))


class Unprepared:
    """Base of policies that keep nothing of the views."""

    def prepare(self, workers: Sequence[WorkerView], now: float) -> None:
        """Nothing to do."""


class Rotation:
    """Ties go round: of several equal choices the one that has waited longest for its turn is taken."""

    def __init__(self) -> None:
        self._turn = 0
        self._turn_of: dict[str, int] = {}

    def last(self, worker_id: str) -> int:
        """When the worker was last taken, as a number that rises; 0 if never."""
        return self._turn_of.get(worker_id, 0)

    def took(self, worker_id: str) -> None:
        self._turn += 1
        self._turn_of[worker_id] = self._turn

    def least(
        self, workers: Sequence[WorkerView], cost: Callable[[WorkerView], float]
    ) -> tuple[WorkerView, str | None]:
        """Take the worker of least cost; beside it the id of the runner-up. workers must not be empty."""
        order = sorted((cost(w), self.last(w.worker_id), i) for i, w in enumerate(workers))
        best = workers[order[0][2]]
        self.took(best.worker_id)
        return best, workers[order[1][2]].worker_id if len(order) > 1 else None
