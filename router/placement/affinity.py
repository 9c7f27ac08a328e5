"""Placement by prefix cache and load, without predictions: baselines. PURE."""

from __future__ import annotations

from nexusengine.errors import ConfigError
from nexusengine.router.placement.candidates import Stateless
from nexusengine.router.placement.policy import Place, PlacementRequest, WorkerView


class CacheAware(Stateless):
    """The longest cached prefix unless load is uneven: the rule of SGLang's router, with its default thresholds.

    Load is uneven when the most requests in flight exceed the fewest by more than `abs` and by more than `rel` times;
    then the least loaded worker is taken, as it is when less than the share `match` of the prompt is cached anywhere.
    """

    name = "cache-aware"
    uses_prefixes = True

    def __init__(self, match: float = 0.5, abs: float = 32.0, rel: float = 1.0001) -> None:
        super().__init__()
        if not 0.0 <= match <= 1.0 or abs < 0.0 or rel < 1.0:
            raise ConfigError(
                f"{self.name}: match must be in 0..1, abs >= 0 and rel >= 1, got {match}, {abs} and {rel}",
                param="router",
            )
        self._match, self._abs, self._rel = match, abs, rel

    def _choose(self, request: PlacementRequest, able: list[WorkerView]) -> Place:
        least, most = min(w.outstanding for w in able), max(w.outstanding for w in able)
        uneven = most - least > self._abs and most > self._rel * least
        cached = max(request.cached_tokens.get(w.worker_id, 0) for w in able)
        if uneven or cached <= self._match * request.prompt_tokens:
            best = self._rotation.least(able, lambda w: w.outstanding)
            return Place(best.worker_id, "fewest outstanding, load is uneven" if uneven else "fewest outstanding")
        best = self._rotation.least(able, lambda w: -request.cached_tokens.get(w.worker_id, 0))
        return Place(best.worker_id, "most tokens cached")


class LMetric(Stateless):
    """Least product of new prefill tokens and batch size, both with the request (arXiv 2603.15202).

    New tokens: prompt tokens the worker has still to compute for all it has, and for this one.
    """

    name = "lmetric"
    uses_prefixes = True

    def _choose(self, request: PlacementRequest, able: list[WorkerView]) -> Place:
        def cost(w: WorkerView) -> float:
            tokens = request.prompt_tokens - request.cached_tokens.get(w.worker_id, 0)
            return (new_tokens(w) + tokens) * (w.outstanding + 1.0)

        return Place(self._rotation.least(able, cost).worker_id, "least new tokens x batch size")


def new_tokens(worker: WorkerView) -> int:
    """Prompt tokens the worker has still to compute: as it reported, and of what was dispatched since."""
    reported = worker.load.pending_tokens if worker.load is not None else 0
    unreported = (r.prompt_tokens - r.cached_tokens.get(worker.worker_id, 0) for r in worker.unreported)
    return reported + sum(unreported)
