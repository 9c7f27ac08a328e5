"""A first step-time model: non-negative least squares in (1, tokens, prefill attention, decode KV), learned online.

    t = w0 + w1 * T / 100 + w2 * A / 1e6 + w3 * K / 1e4,   w >= 0

Rows are weighted by 1/t, so that the relative error is what is made small, and forgotten exponentially. The scales are
fixed physical ones: scales taken from the first data would blow the fit up.
"""

from __future__ import annotations

import math

import numpy as np
import numpy.typing as npt

from nexusengine.perf.features import StepFeatures
from nexusengine.perf.model import F8, PerfSnapshot, StepTime

KIND = "linear-1"
_FORGET = 0.998
_QUANTILE = 0.95
_QUANTILE_STEP = 0.02
_SWEEPS = 8
_EVERY_STEP_UNTIL = 64
_EVERY = 8


def _row(features: StepFeatures) -> npt.NDArray[np.float64]:
    return np.array(
        [1.0, features.tokens / 100, features.prefill_attention / 1e6, features.decode_kv_tokens / 1e4], np.float64
    )


class LinearModel:
    """PerformanceModel with four weights in seconds, in the order of the formula above.

    prior: weights to start from, worth a few observations; the default is a small GPU's order of magnitude.
    """

    def __init__(self, prior: tuple[float, float, float, float] = (0.005, 0.01, 0.001, 0.001)) -> None:
        self._weights = np.array(prior, np.float64)
        self._gram = np.zeros((4, 4))
        self._moment = np.zeros(4)
        self._log_quantile = math.log(1.2)
        self._steps = 0
        for tokens, attention, kv in ((1, 0.0, 0), (100, 0.0, 10_000), (1000, 1e6, 0)):
            features = StepFeatures(tokens, 1, 0, attention, kv)
            self._learn(_row(features), float(_row(features) @ self._weights), 0.01)

    def predict(self, features: StepFeatures) -> StepTime:
        mean_s = max(float(_row(features) @ self._weights), 1e-6)
        return StepTime(mean_s, mean_s * math.exp(self._log_quantile))

    def mean_s(self, tokens: F8, sequences: F8, prefills: F8, prefill_attention: F8, decode_kv_tokens: F8) -> F8:
        w = self._weights
        total: F8 = w[0] + w[1] * tokens / 100 + w[2] * prefill_attention / 1e6 + w[3] * decode_kv_tokens / 1e4
        return np.maximum(total, 1e-6)

    def observe(self, features: StepFeatures, seconds: float) -> None:
        if not (math.isfinite(seconds) and seconds > 0.0):
            return
        row = _row(features)
        covered = seconds <= self.predict(features).upper_s
        self._log_quantile += _QUANTILE_STEP * ((1 - _QUANTILE) * -1 if covered else _QUANTILE)
        self._log_quantile = max(self._log_quantile, 0.0)
        self._gram *= _FORGET
        self._moment *= _FORGET
        self._learn(row, seconds, 1.0)
        self._steps += 1
        if self._steps <= _EVERY_STEP_UNTIL or self._steps % _EVERY == 0:
            self._solve()

    def max_tokens(self, budget_s: float, base: StepFeatures, context: int, limit: int) -> int:
        """Bisection: the predicted time rises with the chunk."""

        def fits(q: int) -> bool:
            joined = StepFeatures(
                base.tokens + q,
                base.sequences + 1,
                base.prefills + (q > 1),
                base.prefill_attention + (q * (context + 0.5 * q) if q > 1 else 0.0),
                base.decode_kv_tokens + (context + 1 if q == 1 else 0),
            )
            return self.predict(joined).upper_s <= budget_s

        low, high = 0, limit
        while low < high:
            middle = (low + high + 1) // 2
            low, high = (middle, high) if fits(middle) else (low, middle - 1)
        return low

    def snapshot(self) -> PerfSnapshot:
        return PerfSnapshot(KIND, tuple(self._weights.tolist()), math.exp(self._log_quantile), self._steps)

    def _learn(self, row: npt.NDArray[np.float64], seconds: float, weight: float) -> None:
        scaled = row / seconds
        self._gram += weight * np.outer(scaled, scaled)
        self._moment += weight * scaled

    def _solve(self) -> None:
        """Coordinate descent on the normal equations, from the weights there are."""
        for _ in range(_SWEEPS):
            for i in range(4):
                if self._gram[i, i] > 0:
                    rest = self._moment[i] - self._gram[i] @ self._weights + self._gram[i, i] * self._weights[i]
                    self._weights[i] = max(rest / self._gram[i, i], 0.0)
