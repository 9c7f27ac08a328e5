"""The additive score of the NexusSched paper (arXiv 2509.23384) as this project understands it: a baseline. PURE."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from nexusengine.errors import ConfigError
from nexusengine.router.placement.candidates import Rotation, ServesLate, why_none
from nexusengine.router.placement.forecast_matrix import ForecastMatrix
from nexusengine.router.placement.policy import Decision, Place, PlacementRequest, WorkerView
from nexusengine.router.placement.prism import assess

_IDLE_BELOW, _BUSY_FROM = 0.1, 1.0


class PaperPrism(ServesLate):
    """Most of (1 - predicted TTFT / its bound) + (1 - tanh(pending / capacity)) + mode + affinity.

    pending: prompt tokens yet to be computed; capacity: how many the worker computes within the request's TTFT.
    mode: 1 for a worker with next to nothing pending, 0 for one with more than its capacity, 0.5 between.
    affinity: weight times the cached share of the prompt.

    Args:
        affinity: that weight.
        ttft: seconds, the bound of requests without an SLO.
    """

    name = "paper-prism"
    uses_prefixes = True

    def __init__(self, affinity: float = 0.5, ttft: float = 2.0) -> None:
        if affinity < 0.0 or ttft <= 0.0:
            raise ConfigError(f"{self.name}: affinity must be >= 0 and ttft > 0, got {affinity} and {ttft}")
        self._affinity, self._ttft_s = affinity, ttft
        self._matrix = ForecastMatrix()
        self._rotation = Rotation()

    def prepare(self, workers: Sequence[WorkerView], now: float) -> None:
        """See PlacementPolicy."""
        self._matrix.update(workers, now)

    def place(self, request: PlacementRequest, workers: Sequence[WorkerView], now: float) -> Decision:
        """See PlacementPolicy."""
        matrix = self._matrix
        matrix.update(workers, now)
        eligible = matrix.eligible(request)
        if eligible is None:
            return why_none(request, workers)
        costs = assess(matrix, request, now)
        ttft_s = request.slo.ttft_s if request.slo else self._ttft_s
        share = (matrix.ahead_s[:, -1] + matrix.estimates.late_s) / ttft_s
        mode = np.where(share < _IDLE_BELOW, 1.0, np.where(share < _BUSY_FROM, 0.5, 0.0))
        cached = matrix.cached_tokens(request) / max(request.prompt_tokens, 1)
        score = (1.0 - costs.first_token_s / ttft_s) + (1.0 - np.tanh(share)) + mode + self._affinity * cached
        score = np.where(eligible, score, -np.inf)
        equal = np.flatnonzero(score >= score.max() - 1e-9).tolist()
        best = min(equal, key=lambda i: self._rotation.last(workers[i].worker_id))
        self._rotation.took(workers[best].worker_id)
        return Place(workers[best].worker_id, "most score", float(costs.first_token_s[best]))
