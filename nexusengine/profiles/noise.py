"""How measured steps scatter about the mean of their kind: a quantile table, read as an inverse CDF with mean 1."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from nexusengine.arrays import F8


class Noise:
    """Factors at evenly spaced quantiles from 0 to 1, increasing, for decode-only and for mixed steps.

    Each is scaled to a mean of exactly 1 under linear interpolation.
    """

    def __init__(self, decode: Sequence[float] | F8, mixed: Sequence[float] | F8) -> None:
        self._decode, self._mixed = _unit_mean(decode), _unit_mean(mixed)

    def __call__(self, u: F8, mixed: bool) -> F8:
        factors, at = self._mixed if mixed else self._decode
        return np.interp(u, at, factors)


def _unit_mean(quantiles: Sequence[float] | F8) -> tuple[F8, F8]:
    """The factors scaled, and the quantiles they stand at."""
    q = np.asarray(quantiles, np.float64)
    mean = float(((q[:-1] + q[1:]) / 2).mean())
    return q / mean, np.linspace(0.0, 1.0, len(q))
