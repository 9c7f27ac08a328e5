"""A profile that is what a worker has learned: its step-time model, as it was recorded."""

from __future__ import annotations

import math
from collections.abc import Sequence
from statistics import NormalDist

import numpy as np

from nexusengine.arrays import F8, I4
from nexusengine.perf.features import StepFeatures
from nexusengine.perf.registry import rebuild
from nexusengine.profiles.base import ProfileIdentity
from nexusengine.profiles.noise import Noise
from nexusengine.wire import PerfSnapshot

_BOUND_QUANTILE = 0.95  # what an upper bound of perf.model.StepTime is
_LARGEST_FACTOR = 3.0
_QUANTILES, _TRIM = 101, 0.001
_DECODE, _MIXED = StepFeatures(4, 4, 0, 0.0, 2048), StepFeatures(132, 5, 1, 8192.0, 2048)


OCTAVES = 21
_AS_IT_IS = (1.0,) * OCTAVES


def octave(tokens: int) -> int:
    """Which power of two a number of tokens is below: 0 of none, 1 of 1, 2 of 2 and 3, 3 of 4 to 7 ..."""
    return min(tokens.bit_length(), OCTAVES - 1)


class LearnedProfile:
    """A profile that answers what a performance model predicts.

    Args:
        identity: of the profile.
        snapshot: of the performance model.
        scale: by what predictions are multiplied, of decode-only and of mixed steps, by `octave` of their tokens.
        noise: scatter of steps; None: log-normal, so that the model's upper bound is the 95 % quantile.

    Raises:
        ValueError: the snapshot cannot be read.
    """

    def __init__(
        self,
        identity: ProfileIdentity,
        snapshot: PerfSnapshot,
        *,
        scale: tuple[Sequence[float], Sequence[float]] = (_AS_IT_IS, _AS_IT_IS),
        noise: Noise | None = None,
    ) -> None:
        self.identity = identity
        self._predictor, self._scale = rebuild(snapshot), scale
        self._noise = noise or Noise(*(_log_normal(self._upper_factor(f)) for f in (_DECODE, _MIXED)))

    def step_s(self, counts: I4, contexts: I4) -> float:
        features = StepFeatures.of(counts, contexts)
        return self._scale[features.prefills > 0][octave(features.tokens)] * self._predictor.predict(features).mean_s

    def decode_run_s(self, contexts: I4, steps: int) -> F8:
        rows = float(len(contexts))
        kv = float(np.add.reduce(contexts)) + rows * np.arange(1, steps + 1, dtype=np.float64)
        ones, none = np.full(steps, rows), np.zeros(steps)
        run: F8 = self._scale[0][octave(len(contexts))] * self._predictor.mean_s(ones, ones, none, none, kv)
        return run

    def noise(self, u: F8, mixed: bool) -> F8:
        return self._noise(u, mixed)

    def _upper_factor(self, features: StepFeatures) -> float:
        time = self._predictor.predict(features)
        return min(max(time.upper_s / time.mean_s, 1.0), _LARGEST_FACTOR)


def _log_normal(upper_factor: float) -> F8:
    """Quantiles at 0, 0.01 .. 1 of a log-normal of mean 1 whose 95 % quantile is `upper_factor`, at most 3."""
    z = NormalDist().inv_cdf(_BOUND_QUANTILE)
    sigma = z - math.sqrt(z * z - 2.0 * math.log(upper_factor))
    at = np.clip(np.linspace(0.0, 1.0, _QUANTILES), _TRIM, 1 - _TRIM)
    return np.exp([sigma * NormalDist().inv_cdf(p) - sigma**2 / 2 for p in at.tolist()])
