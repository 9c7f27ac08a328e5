"""The step-time model that every worker runs: it learns from each step measured, in about 20 µs.

Relative least squares (each row divided by the measured time) with non-negative weights on the terms of `basis`, from
normal equations that are kept by kind of step, decode-only or mixed, and by octave of tokens. Each kind forgets only
when it is seen again, so that an hour of decodes does not erase what is known of prompts.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from nexusengine.perf import basis
from nexusengine.perf.curve import Curve
from nexusengine.perf.features import StepFeatures
from nexusengine.perf.model import F8, PerfSnapshot, StepTime
from nexusengine.perf.nnls import solve
from nexusengine.perf.prior import GENERIC, Prior
from nexusengine.perf.residual import Bound, Trend

KIND = "online-1"

_FORGET = 0.998  # of a kind of step, each time it is seen: a memory of 500 such steps
_FORGET_ALL = 0.9998  # of everything, each step: a memory of 5000
_PRIOR_WEIGHT, _PRIOR_FORGET = 0.05, 0.99
_BEND, _JUMP, _OTHER = 1e-2, 2e-2, 1e-5  # pull towards zero, in observations, where nothing has been seen
_EVERY_STEP_UNTIL, _EVERY = 32, 8  # solved after each of the first steps of a kind, then after every eighth step
_SPIKE, _SPIKES_ARE_DRIFT, _TRUSTED_AFTER = 1.6, 8, 32
_KEEP_AT_DRIFT = 0.1
_SCALED_BY = 8  # steps of a kind that tell the scale of the prior
_COLD_UNTIL = 16  # steps of a kind after which cold ones teach nothing more

_DECODE_EDGES, _MIXED_EDGES = (8, 32, 128), (64, 128, 256, 512, 1024)
_STRATA = len(_DECODE_EDGES) + 1 + len(_MIXED_EDGES) + 1


def stratum(f: StepFeatures) -> int:
    """Kind of step: decode-only ones by octave of tokens, then mixed ones by octave."""
    if not f.prefills:
        return sum(f.tokens > edge for edge in _DECODE_EDGES)
    return len(_DECODE_EDGES) + 1 + sum(f.tokens > edge for edge in _MIXED_EDGES)


@dataclass(slots=True)
class _Scale:
    """How much slower a kind of steps is than the prior says: the geometric mean over the first steps measured."""

    log_ratio: float = 0.0
    steps: int = 0

    def learn(self, log_ratio: float) -> None:
        if self.steps < _SCALED_BY:
            self.steps += 1
            self.log_ratio += (log_ratio - self.log_ratio) / self.steps


class OnlineModel:
    """PerformanceModel. prior: what to believe before anything was measured.

    epoch rises whenever the device was found to have changed; spikes counts steps that were too long to be believed.
    """

    def __init__(self, prior: Prior = GENERIC) -> None:
        n = basis.TERMS
        self.epoch = self.spikes = self.steps = 0
        self._gram, self._moment = np.zeros((_STRATA, n, n)), np.zeros((_STRATA, n))
        self._seen = np.zeros(_STRATA, np.int64)
        self._in_a_row, self._log_ratio_in_a_row = 0, 0.0
        self._bounds = (Bound(), Bound())
        self._trend = Trend()
        self._scales = (_Scale(), _Scale())
        self._weights = np.zeros(n)
        self._tokens_seen = float(prior.tokens)
        rows = np.array([basis.terms(f) for f in prior.steps]) / np.array(prior.seconds)[:, None]
        mixed = np.array([f.prefills > 0 for f in prior.steps])
        self._prior_rows = (rows[~mixed], rows[mixed])
        self._prior_weight, self._pull = 1.0, np.full(n, _OTHER)
        self._solve()
        self._prior_curve, self._prior_weight, self._pull = self._curve, _PRIOR_WEIGHT, _pull(self._curve)

    # ---- predictions ---------------------------------------------------------------------------------------------

    def predict(self, features: StepFeatures) -> StepTime:
        return self._curve.predict(features)

    def mean_s(self, tokens: F8, sequences: F8, prefills: F8, prefill_attention: F8, decode_kv_tokens: F8) -> F8:
        return self._curve.mean_s(tokens, sequences, prefills, prefill_attention, decode_kv_tokens)

    def max_tokens(self, budget_s: float, base: StepFeatures, context: int, limit: int) -> int:
        return self._curve.max_tokens(budget_s, base, context, limit)

    def snapshot(self) -> PerfSnapshot:
        """weights: those of `basis`, then the arguments of Curve after them."""
        c = self._curve
        weights = (*c.weights, c.seen, c.factor_decode, c.factor_mixed, c.offset_s)
        return PerfSnapshot(KIND, weights, max(c.factor_decode, c.factor_mixed), self.steps, self.epoch)

    # ---- learning ------------------------------------------------------------------------------------------------

    def observe(self, features: StepFeatures, seconds: float) -> None:
        if not (math.isfinite(seconds) and seconds > 0.0 and features.tokens > 0):
            return
        self._learn(features, seconds)

    def observe_cold(self, features: StepFeatures, seconds: float) -> None:
        """A step that ran right after idle time, a graph capture or a start: it tells something only while its kind is
        hardly known."""
        if self._seen[stratum(features)] < _COLD_UNTIL:
            self.observe(features, seconds)

    def _learn(self, features: StepFeatures, seconds: float) -> None:
        self.steps += 1
        predicted_s = self._curve.predict(features).mean_s
        log_ratio = math.log(seconds / predicted_s)
        mixed = features.prefills > 0
        self._bounds[mixed].learn(log_ratio)
        self._curve.factor_decode, self._curve.factor_mixed = (bound.factor for bound in self._bounds)
        if not mixed:
            plain_s = predicted_s - self._curve.offset_s
            self._trend.learn(seconds - plain_s, plain_s)
            self._curve.offset_s = self._trend.offset_s
        kind = stratum(features)
        if seconds > _SPIKE * predicted_s and self._seen[kind] >= _TRUSTED_AFTER:
            self.spikes += 1
            self._in_a_row += 1
            self._log_ratio_in_a_row += log_ratio
            if self._in_a_row < _SPIKES_ARE_DRIFT:
                return
            self._accept_drift()
        self._in_a_row, self._log_ratio_in_a_row = 0, 0.0
        if self._scales[mixed].steps < _SCALED_BY:
            self._scales[mixed].learn(math.log(seconds / self._prior_curve.predict(features).mean_s))
        row = basis.terms(features) / seconds
        self._gram[kind] *= _FORGET
        self._gram[kind] += row[:, None] * row
        self._moment[kind] *= _FORGET
        self._moment[kind] += row
        self._seen[kind] += 1
        self._prior_weight *= _PRIOR_FORGET
        if self._seen[kind] <= _EVERY_STEP_UNTIL or self.steps % _EVERY == 0:
            self._gram *= _FORGET_ALL**_EVERY
            self._moment *= _FORGET_ALL**_EVERY
            self._tokens_seen = max(self._tokens_seen, float(features.tokens))
            self._solve()
        elif features.tokens > self._tokens_seen:
            self._tokens_seen = float(features.tokens)
            self._renew()

    def _accept_drift(self) -> None:
        """The device has become slower: take all that is known to have become so by the same factor, and believe it
        less."""
        ratio = math.exp(self._log_ratio_in_a_row / self._in_a_row)
        self._gram *= _KEEP_AT_DRIFT / ratio**2
        self._moment *= _KEEP_AT_DRIFT / ratio
        for scale in self._scales:
            scale.log_ratio += math.log(ratio)
        self._trend.rescale(ratio)
        self._weights = self._weights * ratio
        self.epoch += 1

    def _solve(self) -> None:
        gram, moment = self._gram.sum(axis=0), self._moment.sum(axis=0)
        for rows, own, other in zip(self._prior_rows, self._scales, reversed(self._scales), strict=True):
            slower = math.exp(own.log_ratio if own.steps else 0.5 * other.log_ratio)
            gram += self._prior_weight / slower**2 * (rows.T @ rows)
            moment += self._prior_weight / slower * rows.sum(axis=0)
        gram.flat[:: basis.TERMS + 1] += self._pull
        self._weights = solve(gram, moment, self._weights)
        self._renew()

    def _renew(self) -> None:
        decode, mixed = self._bounds
        self._curve = Curve(
            self._weights.tolist(), self._tokens_seen, decode.factor, mixed.factor, self._trend.offset_s
        )


def _pull(curve: Curve) -> F8:
    """By how much each weight is drawn to zero: as if that many observations had shown that a step is none the longer
    for its term, at a size at which the term counts."""
    pull = np.full(basis.TERMS, _OTHER)
    for first, places, strength in ((basis.FIRST_HINGE, basis.HINGES, _BEND), (basis.FIRST_STEP, basis.STEPS, _JUMP)):
        for i, at in enumerate(places):
            step = StepFeatures(2 * at, 1, 1, 2.0 * at * at, 0)
            term = basis.terms(step)[first + i]
            pull[first + i] = strength * (term / curve.predict(step).mean_s) ** 2
    return pull


def rebuild_curve(weights: Sequence[float]) -> Curve:
    """From `OnlineModel.snapshot().weights`. Raises ValueError."""
    n = basis.TERMS
    if len(weights) != n + 4:
        raise ValueError(f"a snapshot of {len(weights)} numbers; {n + 4} are needed")
    if not all(map(math.isfinite, weights)) or min(weights[: n + 1]) < 0.0 or min(weights[n + 1 : n + 3]) < 1.0:
        raise ValueError(f"the numbers of a snapshot are out of range: {weights}")
    return Curve(weights[:n], *weights[n:])
