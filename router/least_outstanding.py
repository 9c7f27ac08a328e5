"""Fewest requests in flight, ties in rotation. Knows no speed and no SLO: the baseline."""

from __future__ import annotations

from collections.abc import Sequence

from nexusengine.errors import ContextTooLong
from nexusengine.router.policy import Decision, Hold, Place, PlacementRequest, Refuse, WorkerView
from nexusengine.wire import WorkerState


class LeastOutstanding:
    name = "least-outstanding"

    def __init__(self) -> None:
        self._turn = 0

    def place(self, request: PlacementRequest, workers: Sequence[WorkerView], now: float) -> Decision:
        fitting = [w for w in workers if fits(request, w)]
        if workers and not fitting:
            longest = max(w.info.max_model_len for w in workers)
            asked = f" and {request.max_tokens} output tokens were asked for" if request.max_tokens else ""
            return Refuse(
                ContextTooLong.code,
                f"the prompt has {request.prompt_tokens} tokens{asked}, but prompt and output together can have at "
                f"most {longest}",
            )
        ready = [w for w in fitting if w.state is WorkerState.READY]
        if not ready:
            return Hold(request.deadline_s, "no worker is ready")
        self._turn += 1
        order = sorted(range(len(ready)), key=lambda i: (ready[i].outstanding, (i - self._turn) % len(ready)))
        best = ready[order[0]]
        runner_up = ready[order[1]].worker_id if len(order) > 1 else None
        return Place(best.worker_id, f"{best.outstanding} outstanding", runner_up)


def fits(request: PlacementRequest, worker: WorkerView) -> bool:
    """Whether the worker can ever hold the request; one that has not said how much it holds may."""
    longest = worker.info.max_model_len
    return not longest or request.prompt_tokens + max(request.max_tokens, 1) <= longest


class RoundRobin:
    """Each ready worker in turn."""

    name = "round-robin"

    def __init__(self) -> None:
        self._least = LeastOutstanding()
        self._turn = 0

    def place(self, request: PlacementRequest, workers: Sequence[WorkerView], now: float) -> Decision:
        ready = [w for w in workers if w.state is WorkerState.READY and fits(request, w)]
        if not ready:
            return self._least.place(request, workers, now)
        self._turn += 1
        return Place(ready[self._turn % len(ready)].worker_id, "its turn")
