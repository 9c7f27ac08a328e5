"""For comparison: the saturating throughput surface of the paper (arXiv 2509.23384), refitted over a window of steps.

    t = tau0 + (w0 + w1 S) / (P (1 - exp(-kB B)) (1 - exp(-kS S))) + tauB B + tauS S

B sequences, S tokens; nothing of context lengths. For given kB and kS the rest is linear in tau0, w0/P, w1/P, tauB and
tauS, which are fitted by non-negative least squares of relative errors; kB and kS are searched on a grid.
"""

from __future__ import annotations

import math
from collections import deque
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

KIND = "paper-surface-1"
_WINDOW, _EVERY, _FIRST = 1000, 200, 50
_K_SEQUENCES = np.geomspace(0.01, 3.0, 8)
_K_TOKENS = np.geomspace(1e-4, 0.3, 12)
_TERMS = 5


class Surface:
    """Predictor.

    Args:
        weights: tau0, w0/P, w1/P, tauB, tauS in seconds, then kB and kS.
        factor_decode: from the mean to the upper bound of decode-only steps.
        factor_mixed: as that, of mixed steps.
    """

    def __init__(self, weights: Sequence[float], factor_decode: float, factor_mixed: float) -> None:
        self.weights = tuple(weights)
        self.factor_decode, self.factor_mixed = factor_decode, factor_mixed

    def predict(self, features: StepFeatures) -> StepTime:
        tau0, w0, w1, tau_b, tau_s, k_b, k_s = self.weights
        b, s = features.sequences, features.tokens
        filled = (1.0 - math.exp(-k_b * b)) * (1.0 - math.exp(-k_s * s))
        mean_s = tau0 + (w0 + w1 * s) / max(filled, 1e-9) + tau_b * b + tau_s * s
        mean_s = max(mean_s, SHORTEST_S)
        return StepTime(mean_s, mean_s * (self.factor_mixed if features.prefills else self.factor_decode))

    def mean_s(self, tokens: F8, sequences: F8, prefills: F8, prefill_attention: F8, decode_kv_tokens: F8) -> F8:
        shape = np.broadcast(tokens, sequences, prefills, prefill_attention, decode_kv_tokens).shape
        b, s = np.broadcast_to(sequences, shape), np.broadcast_to(tokens, shape)
        result: F8 = np.maximum(_terms(b, s, *self.weights[_TERMS:]) @ np.array(self.weights[:_TERMS]), SHORTEST_S)
        return result


class SurfaceModel:
    """PerformanceModel: keeps the newest 1000 steps and fits them anew every 200."""

    def __init__(self, prior: Prior = GENERIC) -> None:
        self.steps = 0
        self._bounds = (Bound(), Bound())
        self._errors = RecentErrors()
        self._window: deque[tuple[int, int, float]] = deque(maxlen=_WINDOW)
        self._fit([(f.sequences, f.tokens, s) for f, s in zip(prior.steps, prior.seconds, strict=True)])

    def predict(self, features: StepFeatures) -> StepTime:
        return self._surface.predict(features)

    def mean_s(self, tokens: F8, sequences: F8, prefills: F8, prefill_attention: F8, decode_kv_tokens: F8) -> F8:
        return self._surface.mean_s(tokens, sequences, prefills, prefill_attention, decode_kv_tokens)

    def observe(self, features: StepFeatures, seconds: float) -> None:
        took_s = duration(seconds)
        if took_s is None or features.tokens < 1:
            return
        self.steps += 1
        log_ratio = math.log(took_s / self.predict(features).mean_s)
        self._errors.learn(stratum(features), log_ratio)
        self._bounds[features.prefills > 0].learn(log_ratio)
        self._window.append((features.sequences, features.tokens, took_s))
        if self.steps == _FIRST or self.steps % _EVERY == 0:
            self._fit(self._window)
        self._surface.factor_decode, self._surface.factor_mixed = self._bounds[0].factor, self._bounds[1].factor

    def observe_cold(self, features: StepFeatures, seconds: float) -> None:
        """Does nothing: cold steps are not learned from."""

    def expect_change(self) -> None:
        """Detects no changes, and so expects none."""

    def recent_error(self, features: StepFeatures) -> RecentError:
        return self._errors.of(features)

    def snapshot(self) -> PerfSnapshot:
        """Its weights are those of Surface, then the factors of decode-only and mixed steps."""
        decode, mixed = self._surface.factor_decode, self._surface.factor_mixed
        return PerfSnapshot(KIND, (*self._surface.weights, decode, mixed), max(decode, mixed), self.steps)

    def _fit(self, steps: Sequence[tuple[int, int, float]] | deque[tuple[int, int, float]]) -> None:
        b, s, seconds = np.array(steps, np.float64).T
        best: tuple[float, F8, float, float] | None = None
        for k_b in _K_SEQUENCES.tolist():
            for k_s in _K_TOKENS.tolist():
                rows = _terms(b, s, k_b, k_s) / seconds[:, None]
                gram = rows.T @ rows
                gram.flat[:: _TERMS + 1] += 1e-9
                weights = solve(gram, rows.sum(axis=0), np.zeros(_TERMS))
                error = float(((rows @ weights - 1.0) ** 2).sum())
                if best is None or error < best[0]:
                    best = (error, weights, k_b, k_s)
        assert best is not None
        _, weights, k_b, k_s = best
        self._surface = Surface((*weights.tolist(), k_b, k_s), self._bounds[0].factor, self._bounds[1].factor)


def _terms(b: F8, s: F8, k_b: float, k_s: float) -> F8:
    """`[..., 5]`: what tau0, w0/P, w1/P, tauB and tauS are multiplied with."""
    filled = np.maximum((1.0 - np.exp(-k_b * b)) * (1.0 - np.exp(-k_s * s)), 1e-9)
    return np.stack([np.ones(np.shape(s)), 1.0 / filled, s / filled, b, s], axis=-1)


def rebuild_surface(weights: Sequence[float]) -> Surface:
    """The predictor of `SurfaceModel.snapshot().weights`.

    Raises:
        ValueError: they are not such weights.
    """
    if len(weights) != _TERMS + 4 or not all(map(math.isfinite, weights)) or min(weights) < 0.0:
        raise ValueError(f"the weights of a surface are {_TERMS + 4} finite numbers >= 0, not {weights}")
    return Surface(weights[: _TERMS + 2], weights[-2], weights[-1])
