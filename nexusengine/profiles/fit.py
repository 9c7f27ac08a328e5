"""From a log of real steps to a profile: weights of a piecewise-linear step time, and how steps scatter about it.

    t = w . [1, P, T, (T-128)+, (T-256)+, (T-512)+, (T-1024)+, n, prefills, A, K, P*K],   w >= 0

with P = 1 where a prompt chunk is in the step, T tokens, n sequences, A and K as in perf.features. Rows are divided by
the time observed, so that the relative error is what is made small. Scales are fixed physical ones.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from nexusengine.arrays import F8
from nexusengine.errors import ConfigError
from nexusengine.perf.features import StepFeatures
from nexusengine.perf.nnls import solve

KNEES = (128, 256, 512, 1024)
FEATURES = 8 + len(KNEES)
FEWEST_STEPS = 200
_WINDOW = 51
_QUANTILES = 101
_TRIM = 0.001


def row(f: StepFeatures) -> list[float]:
    """The features of the formula above, scaled."""
    mixed = 1.0 if f.prefills else 0.0
    t = float(f.tokens)
    return [
        1.0,
        mixed,
        t / 100,
        *(max(t - knee, 0.0) / 100 for knee in KNEES),
        f.sequences / 100,
        float(f.prefills),
        f.prefill_attention / 1e6,
        f.decode_kv_tokens / 1e4,
        mixed * f.decode_kv_tokens / 1e4,
    ]


@dataclass(frozen=True, slots=True)
class Fit:
    """A formula fitted to steps.

    Attributes:
        weights_s: in the order of the formula.
        decode_noise: quantiles of observed over fitted time, at evenly spaced probabilities.
        mixed_noise: as that, of mixed steps.
        median_error: absolute, relative, of all steps.
        longest_step_tokens: the largest T.
    """

    weights_s: tuple[float, ...]
    decode_noise: tuple[float, ...]
    mixed_noise: tuple[float, ...]
    median_error: float
    steps: int
    longest_step_tokens: int


def fit_steps(features: Sequence[StepFeatures], seconds: Sequence[float] | F8) -> Fit:
    """Fit the formula to measured steps.

    Raises:
        ConfigError: there are too few of them.
    """
    if len(features) < FEWEST_STEPS:
        raise ConfigError(f"{len(features)} steps are too few to fit a profile to; record at least {FEWEST_STEPS}")
    weights, ratio, keep = _fit(features, seconds)
    decode, mixed = _scatter_by_kind(features, ratio, keep)
    decode, mixed = (decode if len(decode) else mixed), (mixed if len(mixed) else decode)
    return Fit(
        tuple(weights.tolist()),
        tuple(quantiles(decode).tolist()),
        tuple(quantiles(mixed).tolist()),
        float(np.median(np.abs(1 / ratio[keep] - 1))),
        int(keep.sum()),
        max(f.tokens for f in features),
    )


def scatter_of(features: Sequence[StepFeatures], seconds: Sequence[float] | F8) -> tuple[F8, F8]:
    """The scatter of decode-only and of mixed steps of a log about a good local fit."""
    _, ratio, keep = _fit(features, seconds)
    return _scatter_by_kind(features, ratio, keep)


def _fit(features: Sequence[StepFeatures], seconds: Sequence[float] | F8) -> tuple[F8, F8, npt.NDArray[np.bool_]]:
    """Weights, observed over fitted time of all steps, and which steps count: those within a factor of 3."""
    took = np.asarray(seconds, np.float64)
    x = np.array([row(f) for f in features])
    keep = np.isfinite(took) & (took > 0.0)
    ratio = took / (x @ _non_negative(x[keep] / took[keep, None]))
    keep &= (ratio < 3.0) & (ratio > 1 / 3)  # warm-up, graph capture: not of the kind that comes again
    weights = _non_negative(x[keep] / took[keep, None])
    return weights, took / (x @ weights), keep


def _scatter_by_kind(features: Sequence[StepFeatures], ratio: F8, keep: npt.NDArray[np.bool_]) -> tuple[F8, F8]:
    mixed = np.array([f.prefills > 0 for f in features])
    return scatter(ratio[keep & ~mixed]), scatter(ratio[keep & mixed])


def scatter(ratio: F8) -> F8:
    """Observed over fitted with what varies slowly taken out; empty where there are fewer than a neighbourhood.

    Each is divided by the median of its neighbourhood in time.
    """
    if len(ratio) < _WINDOW:
        return ratio[:0]
    half = _WINDOW // 2
    padded = np.concatenate([ratio[half:0:-1], ratio, ratio[-2 : -half - 2 : -1]])
    local = np.median(np.lib.stride_tricks.sliding_window_view(padded, _WINDOW), axis=1)
    out: F8 = ratio / local
    return out


def quantiles(factors: F8) -> F8:
    """At 0, 0.01 .. 1; the ends are those of the middle 99.8 %, so that one odd step does not stand for a percent."""
    at = np.linspace(0.0, 1.0, _QUANTILES)
    out: F8 = np.quantile(factors, np.clip(at, _TRIM, 1 - _TRIM))
    return out


def _non_negative(x: F8) -> F8:
    """Non-negative least squares of x w = 1; terms that never occur stay 0."""
    weights = np.zeros(x.shape[1])
    occurs = np.flatnonzero(x.any(axis=0))
    x = x[:, occurs]
    weights[occurs] = solve(x.T @ x, x.sum(axis=0), np.zeros(len(occurs)))
    return weights
