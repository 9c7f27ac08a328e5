"""For comparison: straight lines in the tokens of a step, or in its tokens and sequences, learned online.

    t = w0 + w1 * T / 100 (+ w2 * n),   w >= 0

Relative least squares with exponential forgetting, as the online model's, but one set of normal equations, and nothing
of attention.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np

from nexusengine.arrays import F8
from nexusengine.perf.features import SHORTEST_S, StepFeatures, duration
from nexusengine.perf.kinds import RecentError, RecentErrors, stratum
from nexusengine.perf.model import StepTime
from nexusengine.perf.nnls import solve
from nexusengine.perf.prior import GENERIC, Prior
from nexusengine.perf.residual import Bound
from nexusengine.wire import PerfSnapshot

KIND = "line-1"
_TOKENS = 100.0
_FORGET, _PRIOR_WEIGHT = 0.998, 0.05
_EVERY_STEP_UNTIL, _EVERY = 64, 8


class Line:
    """Predictor.

    Args:
        weights: w0, w1, w2 of the formula above.
        factor_decode: from the mean to the upper bound of decode-only steps.
        factor_mixed: as that, of mixed steps.
    """

    def __init__(self, weights: Sequence[float], factor_decode: float, factor_mixed: float) -> None:
        self.weights = tuple(weights)
        self.factor_decode, self.factor_mixed = factor_decode, factor_mixed

    def predict(self, features: StepFeatures) -> StepTime:
        w = self.weights
        mean_s = max(w[0] + w[1] * (features.tokens / _TOKENS) + w[2] * features.sequences, SHORTEST_S)
        return StepTime(mean_s, mean_s * (self.factor_mixed if features.prefills else self.factor_decode))

    def mean_s(self, tokens: F8, sequences: F8, prefills: F8, prefill_attention: F8, decode_kv_tokens: F8) -> F8:
        w = self.weights
        shape = np.broadcast(tokens, sequences, prefills, prefill_attention, decode_kv_tokens).shape
        mean_s = np.maximum(w[0] + w[1] * (tokens / _TOKENS) + w[2] * sequences, SHORTEST_S)
        return np.broadcast_to(mean_s, shape)


class LineModel:
    """PerformanceModel.

    Args:
        prior: what to believe before anything was measured.
        by_sequences: sequences count, beside tokens.
    """

    def __init__(self, prior: Prior = GENERIC, *, by_sequences: bool = False) -> None:
        self._terms = 3 if by_sequences else 2
        self.steps = 0
        rows = np.array([self._row(f, s) for f, s in zip(prior.steps, prior.seconds, strict=True)])
        self._gram, self._moment = _PRIOR_WEIGHT * rows.T @ rows, _PRIOR_WEIGHT * rows.sum(axis=0)
        self._gram.flat[:: self._terms + 1] += 1e-9
        self._weights = np.zeros(self._terms)
        self._bounds = (Bound(), Bound())
        self._errors = RecentErrors()
        self._solve()

    def predict(self, features: StepFeatures) -> StepTime:
        return self._line.predict(features)

    def mean_s(self, tokens: F8, sequences: F8, prefills: F8, prefill_attention: F8, decode_kv_tokens: F8) -> F8:
        return self._line.mean_s(tokens, sequences, prefills, prefill_attention, decode_kv_tokens)

    def observe(self, features: StepFeatures, seconds: float) -> None:
        took_s = duration(seconds)
        if took_s is None or features.tokens < 1:
            return
        self.steps += 1
        log_ratio = math.log(took_s / self.predict(features).mean_s)
        self._errors.learn(stratum(features), log_ratio)
        self._bounds[features.prefills > 0].learn(log_ratio)
        row = self._row(features, took_s)
        self._gram = _FORGET * self._gram + row[:, None] * row
        self._moment = _FORGET * self._moment + row
        if self.steps <= _EVERY_STEP_UNTIL or self.steps % _EVERY == 0:
            self._solve()
        self._line.factor_decode, self._line.factor_mixed = self._bounds[0].factor, self._bounds[1].factor

    def observe_cold(self, features: StepFeatures, seconds: float) -> None:
        """Does nothing: cold steps are not learned from."""

    def expect_change(self) -> None:
        """Detects no changes, and so expects none."""

    def recent_error(self, features: StepFeatures) -> RecentError:
        return self._errors.of(features)

    def snapshot(self) -> PerfSnapshot:
        """Its weights are the three of the formula, then the factors of decode-only and mixed steps."""
        decode, mixed = self._line.factor_decode, self._line.factor_mixed
        return PerfSnapshot(KIND, (*self._line.weights, decode, mixed), max(decode, mixed), self.steps)

    def _row(self, f: StepFeatures, seconds: float) -> F8:
        return np.array([1.0, f.tokens / _TOKENS, f.sequences][: self._terms]) / seconds

    def _solve(self) -> None:
        self._weights = solve(self._gram, self._moment, self._weights)
        w = [*self._weights.tolist(), 0.0][:3]
        self._line = Line(w, self._bounds[0].factor, self._bounds[1].factor)


def rebuild_line(weights: Sequence[float]) -> Line:
    """The predictor of `LineModel.snapshot().weights`.

    Raises:
        ValueError: they are not such weights.
    """
    if len(weights) != 5 or not all(map(math.isfinite, weights)) or min(weights) < 0.0:
        raise ValueError(f"the weights of a line are five finite numbers >= 0, not {weights}")
    return Line(weights[:3], weights[3], weights[4])
