"""Placement that knows no SLO and, but for one, no speed: what PRISM is measured against. PURE."""

from __future__ import annotations

from nexusengine.errors import ConfigError
from nexusengine.forecast.speed import REFERENCE_STEP, predictor_of
from nexusengine.router.placement.candidates import Stateless
from nexusengine.router.placement.policy import Place, PlacementRequest, WorkerView
from nexusengine.splitmix import splitmix64

SETTLED_STEPS = 500


class LeastRequests(Stateless):
    """Fewest requests in flight."""

    name = "least-requests"

    def _choose(self, request: PlacementRequest, able: list[WorkerView]) -> Place:
        return Place(self._rotation.least(able, lambda w: w.outstanding).worker_id, "fewest outstanding")


class LeastTokens(Stateless):
    """Fewest tokens in flight: prompts, and output as far as its limit was given."""

    name = "least-tokens"

    def _choose(self, request: PlacementRequest, able: list[WorkerView]) -> Place:
        best = self._rotation.least(able, lambda w: w.outstanding_tokens)
        return Place(best.worker_id, "fewest tokens outstanding")


class RoundRobin(Stateless):
    """Each worker in turn."""

    name = "round-robin"

    def _choose(self, request: PlacementRequest, able: list[WorkerView]) -> Place:
        return Place(self._rotation.least(able, lambda w: 0.0).worker_id, "its turn")


class RoundRobinVeto(Stateless):
    """Each worker in turn, but not one with clearly more in flight than the others.

    Args:
        factor: how many times the mean is too much,
        slack: and so many requests more.
    """

    name = "rr-veto"

    def __init__(self, factor: float = 1.25, slack: float = 2.0) -> None:
        super().__init__()
        if factor < 1.0 or slack < 0.0:
            raise ConfigError(f"{self.name}: factor must be >= 1 and slack >= 0, got {factor} and {slack}")
        self._factor, self._slack = factor, slack

    def _choose(self, request: PlacementRequest, able: list[WorkerView]) -> Place:
        limit = self._factor * sum(w.outstanding for w in able) / len(able) + self._slack
        best = self._rotation.least(able, lambda w: float(w.outstanding > limit))
        return Place(best.worker_id, "its turn, not too much outstanding")


class PowerOfTwo(Stateless):
    """The one with fewer requests in flight of two that are drawn by hashing (seed, number of the placement)."""

    name = "p2c"

    def __init__(self, seed: float = 0.0) -> None:
        super().__init__()
        self._seed, self._drawn = int(seed), 0

    def _choose(self, request: PlacementRequest, able: list[WorkerView]) -> Place:
        if len(able) > 2:
            self._drawn += 1
            first = splitmix64(self._seed, 2 * self._drawn) % len(able)
            step = 1 + splitmix64(self._seed, 2 * self._drawn + 1) % (len(able) - 1)
            able = [able[first], able[(first + step) % len(able)]]
        best = self._rotation.least(able, lambda w: w.outstanding)
        return Place(best.worker_id, "fewest outstanding of two drawn")


class CapacityWeighted(Stateless):
    """Fewest requests in flight per unit of capacity, (outstanding + 1) / weight.

    The weights are what an operator would measure once: how many reference steps a second (`speed.REFERENCE_STEP`)
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

    def _choose(self, request: PlacementRequest, able: list[WorkerView]) -> Place:
        known = {w.worker_id: weight for w in able if (weight := self._weight(w)) is not None}
        mean = sum(known.values()) / len(known) if known else 1.0
        best = self._rotation.least(able, lambda w: (w.outstanding + 1) / known.get(w.worker_id, mean))
        return Place(best.worker_id, "fewest outstanding per weight")

    def _weight(self, worker: WorkerView) -> float | None:
        given = self._given.get(worker.worker_id) or self._settled.get(worker.worker_id)
        perf = worker.load.perf if worker.load is not None else None
        if given is not None or perf is None:
            return given
        weight = 1.0 / predictor_of(perf).predict(REFERENCE_STEP).mean_s
        if perf.steps >= SETTLED_STEPS:
            self._settled[worker.worker_id] = weight
        return weight
