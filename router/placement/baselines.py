"""Placement that knows no SLO and, but for one, no speed: what PRISM is measured against. PURE."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from nexusengine.errors import ConfigError
from nexusengine.router.placement.candidates import Rotation, Unprepared, candidates
from nexusengine.router.placement.forecast import REFERENCE_STEP, predictor_of
from nexusengine.router.placement.policy import Decision, Place, PlacementRequest, WorkerView
from nexusengine.splitmix import splitmix64

SETTLED_STEPS = 500


class _LeastCost(Unprepared):
    """Base: least of some cost among those that may take it, ties in rotation."""

    uses_prefixes = False

    def __init__(self) -> None:
        self._rotation = Rotation()

    def _least(
        self, able: Sequence[WorkerView], cost: Callable[[WorkerView], float], what: str, digits: int = 0
    ) -> Place:
        best, second = self._rotation.least(able, cost)
        return Place(best.worker_id, f"{cost(best):.{digits}f} {what}", second)


class LeastRequests(_LeastCost):
    """Fewest requests in flight."""

    name = "least-requests"

    def place(self, request: PlacementRequest, workers: Sequence[WorkerView], now: float) -> Decision:
        able = candidates(request, workers)
        if not isinstance(able, list):
            return able
        return self._least(able, lambda w: w.outstanding, "outstanding")


class LeastTokens(_LeastCost):
    """Fewest tokens in flight: prompts, and output as far as its limit was given."""

    name = "least-tokens"

    def place(self, request: PlacementRequest, workers: Sequence[WorkerView], now: float) -> Decision:
        able = candidates(request, workers)
        if not isinstance(able, list):
            return able
        return self._least(able, lambda w: w.outstanding_tokens, "tokens outstanding")


class RoundRobin(_LeastCost):
    """Each worker in turn."""

    name = "round-robin"

    def place(self, request: PlacementRequest, workers: Sequence[WorkerView], now: float) -> Decision:
        able = candidates(request, workers)
        if not isinstance(able, list):
            return able
        best, second = self._rotation.least(able, lambda w: 0.0)
        return Place(best.worker_id, "its turn", second)


class RoundRobinVeto(_LeastCost):
    """Each worker in turn, but not one with clearly more in flight than the others: over `factor` times the mean and
    `slack` requests more."""

    name = "rr-veto"

    def __init__(self, factor: float = 1.25, slack: float = 2.0) -> None:
        super().__init__()
        if factor < 1.0 or slack < 0.0:
            raise ConfigError(f"{self.name}: factor must be >= 1 and slack >= 0, got {factor} and {slack}")
        self._factor, self._slack = factor, slack

    def place(self, request: PlacementRequest, workers: Sequence[WorkerView], now: float) -> Decision:
        able = candidates(request, workers)
        if not isinstance(able, list):
            return able
        limit = self._factor * sum(w.outstanding for w in able) / len(able) + self._slack
        best, second = self._rotation.least(able, lambda w: float(w.outstanding > limit))
        reason = f"its turn, {best.outstanding} outstanding of at most {limit:.1f}"
        return Place(best.worker_id, reason, second)


class PowerOfTwo(_LeastCost):
    """The one with fewer requests in flight of two that are drawn by hashing (seed, number of the placement)."""

    name = "p2c"

    def __init__(self, seed: float = 0.0) -> None:
        super().__init__()
        self._seed, self._drawn = int(seed), 0

    def place(self, request: PlacementRequest, workers: Sequence[WorkerView], now: float) -> Decision:
        able = candidates(request, workers)
        if not isinstance(able, list):
            return able
        if len(able) > 2:
            self._drawn += 1
            first = splitmix64(self._seed, 2 * self._drawn) % len(able)
            step = 1 + splitmix64(self._seed, 2 * self._drawn + 1) % (len(able) - 1)
            able = [able[first], able[(first + step) % len(able)]]
        return self._least(able, lambda w: w.outstanding, "outstanding, of two drawn")


class CapacityWeighted(_LeastCost):
    """Fewest requests in flight per unit of capacity, (outstanding + 1) / weight.

    The weights are what an operator would measure once: how many reference steps a second (`forecast.REFERENCE_STEP`)
    the worker does, by its own performance model once that has seen SETTLED_STEPS steps, by what it says so far before.
    Weights can also be given by worker id, `capacity-weighted:w0=3,w1=1`. A worker of which neither is known counts as
    the mean of the others.
    """

    name = "capacity-weighted"

    def __init__(self, **weights: float) -> None:
        super().__init__()
        wrong = next((f"{k}={v}" for k, v in weights.items() if not v > 0), None)
        if wrong is not None:
            raise ConfigError(f"{self.name}: a weight must be above 0, got {wrong}", param="router")
        self._given = weights
        self._settled: dict[str, float] = {}

    def place(self, request: PlacementRequest, workers: Sequence[WorkerView], now: float) -> Decision:
        able = candidates(request, workers)
        if not isinstance(able, list):
            return able
        known = {w.worker_id: weight for w in able if (weight := self._weight(w)) is not None}
        mean = sum(known.values()) / len(known) if known else 1.0
        what = "outstanding per weight"
        return self._least(able, lambda w: (w.outstanding + 1) / known.get(w.worker_id, mean), what, 3)

    def _weight(self, worker: WorkerView) -> float | None:
        given = self._given.get(worker.worker_id) or self._settled.get(worker.worker_id)
        perf = worker.load.perf if worker.load is not None else None
        if given is not None or perf is None:
            return given
        weight = 1.0 / predictor_of(perf).predict(REFERENCE_STEP).mean_s
        if perf.steps >= SETTLED_STEPS:
            self._settled[worker.worker_id] = weight
        return weight
