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

from nexusengine.arrays import F8
from nexusengine.perf import basis
from nexusengine.perf.curve import Curve
from nexusengine.perf.features import SHORTEST_S, StepFeatures, duration
from nexusengine.perf.kinds import DECODE_KINDS, STRATA, RecentError, RecentErrors, stratum
from nexusengine.perf.model import StepTime
from nexusengine.perf.nnls import leverage, solve
from nexusengine.perf.prior import GENERIC, Prior
from nexusengine.perf.residual import Bound, Change, Drift, Level, Trend, is_off, is_spike
from nexusengine.perf.state import BASIS, ModelState, decode_arrays, encode_arrays
from nexusengine.wire import PerfSnapshot

KIND = "online-2"
SECONDS = (*range(basis.TERMS), *range(basis.TERMS + 3, basis.TERMS + 6))
"""Which of a snapshot's weights are times."""

_FORGET = 0.998  # of a kind of step, each time it is seen: a memory of 500 such steps
_FORGET_ALL = 0.9998  # of everything, each step: a memory of 5000
_PRIOR_WEIGHT, _PRIOR_FORGET = 0.05, 0.99
_HINGE, _STEP, _OTHER = 1e-2, 2e-2, 1e-5  # pulls on weights, in observations: see _pull
_EVERY_STEP_UNTIL, _EVERY = 32, 8  # solved after each of the first steps of a kind, then after every eighth step
_TRUSTED_AFTER = 32
_KEEP_AT_DRIFT = 0.1
_SCALED_BY = 8  # steps of a kind that tell the scale of the prior
_HALF = 0.5  # how much of one kind's scale is believed of the other, as long as that was not seen
_COLD_UNTIL = 16  # steps of a kind after which cold ones are not learned from

_LONG_CHUNK = StepFeatures(1024, 1, 1, 1024 * (4096 + 512.0), 0)
_LONG_DECODES = StepFeatures(32, 32, 0, 0.0, 32 * 2048)


@dataclass(slots=True)
class _Scale:
    """Slowness of a kind of steps against the prior: the geometric mean over the first steps measured."""

    log_ratio: float = 0.0
    steps: int = 0

    def learn(self, log_ratio: float) -> None:
        if self.steps < _SCALED_BY:
            self.steps += 1
            self.log_ratio += (log_ratio - self.log_ratio) / self.steps


class OnlineModel:
    """PerformanceModel.

    Args:
        prior: what to believe before anything was measured.

    Attributes:
        epoch: rises whenever the device was found to have changed.
        spikes: steps that were too long to be believed.
        steps: observed.
    """

    def __init__(self, prior: Prior = GENERIC) -> None:
        n = basis.TERMS
        self.epoch = self.spikes = self.steps = 0
        self._gram, self._moment = np.zeros((STRATA, n, n)), np.zeros((STRATA, n))
        self._seen = np.zeros(STRATA, np.int64)
        self._bounds = (Bound(), Bound())
        self._trend, self._level, self._drift = Trend(), Level(), Drift()
        self._errors = RecentErrors()
        self._scales = (_Scale(), _Scale())
        self._weights = np.zeros(n)
        self._tokens_seen, self._token_s = float(prior.tokens), prior.token_s
        rows = np.array([basis.terms(f) for f in prior.steps]) / np.array(prior.seconds)[:, None]
        mixed = np.array([f.prefills > 0 for f in prior.steps])
        self._priors = [(part.T @ part, part.sum(axis=0)) for part in (rows[~mixed], rows[mixed])]
        self._prior_weight, self._pull = 1.0, (np.full(n, _OTHER), np.zeros(n))
        self._solve()
        self._prior_curve, self._prior_weight, self._pull = self._curve, _PRIOR_WEIGHT, _pull(self._curve)

    # ---- predictions ---------------------------------------------------------------------------------------------

    def predict(self, features: StepFeatures) -> StepTime:
        return self._curve.predict(features)

    def mean_s(self, tokens: F8, sequences: F8, prefills: F8, prefill_attention: F8, decode_kv_tokens: F8) -> F8:
        return self._curve.mean_s(tokens, sequences, prefills, prefill_attention, decode_kv_tokens)

    def recent_error(self, features: StepFeatures) -> RecentError:
        return self._errors.of(features)

    def snapshot(self) -> PerfSnapshot:
        """Its weights are `Curve.numbers`, which begin with the weights in the order of `basis`."""
        c = self._curve
        return PerfSnapshot(KIND, c.numbers, max(c.factor_decode, c.factor_mixed), self.steps, self.epoch)

    # ---- what outlives a process ---------------------------------------------------------------------------------

    def state(self) -> ModelState:
        """What `resume` needs; a copy, so that it can be written by another thread."""
        gram, moment = encode_arrays(self._gram, self._moment)
        return ModelState(
            basis=BASIS,
            gram=gram,
            moment=moment,
            seen=tuple(self._seen.tolist()),
            tokens_seen=self._tokens_seen,
            log_scales=(self._scales[0].log_ratio, self._scales[1].log_ratio),
            steps=self.steps,
        )

    def resume(self, state: ModelState, steps: float, slower: float = 1.0) -> None:
        """Go on from what an earlier model had learned, in place of what this one has.

        Args:
            state: of a model with the same prior.
            steps: how many steps of each kind it counts for at most; the fewer, the sooner new steps prevail.
            slower: how many times as long steps take now.

        Raises:
            ValueError: it holds what no model can have learned.
        """
        gram, moment = decode_arrays(state)
        remembered = (1.0 - _FORGET ** np.array(state.seen, np.float64)) / (1.0 - _FORGET)
        keep = np.minimum(steps / np.maximum(remembered, 1.0), 1.0)
        self._gram = gram * (keep / slower**2)[:, None, None]
        self._moment = moment * (keep / slower)[:, None]
        self._tokens_seen = max(state.tokens_seen, self._tokens_seen)
        kinds = np.array(state.seen)
        self._seen = np.minimum(kinds, _COLD_UNTIL)
        known = kinds[:DECODE_KINDS].any(), kinds[DECODE_KINDS:].any()
        for scale, log_ratio, learned in zip(self._scales, state.log_scales, known, strict=True):
            scale.log_ratio, scale.steps = log_ratio + math.log(slower), _SCALED_BY if learned else 0
        self._trend.reset()
        self._level.reset()
        self._solve()

    # ---- learning ------------------------------------------------------------------------------------------------

    def observe(self, features: StepFeatures, seconds: float) -> None:
        took_s = duration(seconds)
        if took_s is not None and features.tokens > 0:
            self._learn(features, took_s)

    def observe_cold(self, features: StepFeatures, seconds: float) -> None:
        """Observe a step that ran right after idle time, a graph capture or a start, while its kind is hardly known."""
        if self._seen[stratum(features)] < _COLD_UNTIL:
            self.observe(features, seconds)

    def expect_change(self) -> None:
        self._drift.expect()

    def _learn(self, features: StepFeatures, seconds: float) -> None:
        self.steps += 1
        curve, mixed, kind = self._curve, features.prefills > 0, stratum(features)
        predicted_s = curve.predict(features).mean_s
        plain_s = max(curve.plain_s(features), SHORTEST_S)
        if self.steps % _EVERY == 0:
            self._gram *= _FORGET_ALL**_EVERY
            self._moment *= _FORGET_ALL**_EVERY
        self._errors.learn(kind, math.log(seconds / predicted_s))
        self._judge(curve, mixed, seconds, predicted_s, plain_s)
        log_ratio = math.log(seconds / plain_s)
        if not is_off(log_ratio):
            self._drift.calm()
        elif self._is_known(features, plain_s):
            change = self._drift.learn(kind, log_ratio)
            if change is not None:
                self._accept(change)
            elif is_spike(log_ratio):
                self.spikes += 1
                return
        if self._scales[mixed].steps < _SCALED_BY:
            self._scales[mixed].learn(math.log(seconds / self._prior_curve.predict(features).mean_s))
        row = np.array(basis.terms(features)) / seconds
        gram, moment = self._gram[kind], self._moment[kind]
        gram *= _FORGET
        gram += row[:, None] * row
        moment *= _FORGET
        moment += row
        self._seen[kind] += 1
        self._prior_weight *= _PRIOR_FORGET
        if self._seen[kind] <= _EVERY_STEP_UNTIL or self.steps % _EVERY == 0:
            self._tokens_seen = max(self._tokens_seen, float(features.tokens))
            self._solve()
        elif features.tokens > self._tokens_seen:
            self._tokens_seen = float(features.tokens)
            self._renew()

    def _judge(self, curve: Curve, mixed: bool, seconds: float, predicted_s: float, plain_s: float) -> None:
        """Learn the bound, the level and, from decode-only steps, the offset."""
        log_ratio = math.log(seconds / predicted_s)
        self._bounds[mixed].learn(log_ratio)
        self._level.learn(log_ratio + math.log(curve.level))
        curve.level = self._level.factor
        curve.factor_decode, curve.factor_mixed = self._bounds[0].factor, self._bounds[1].factor
        if not mixed:
            self._trend.learn(seconds - plain_s, plain_s)
            curve.offset_s, curve.offset_at_s = self._trend.offset_s, self._trend.at_s

    def _is_known(self, features: StepFeatures, predicted_s: float) -> bool:
        """True if what has been seen fixes this prediction; a step that is off is news elsewhere.

        It does if the leverage, the share that one more such observation would have in it, is that of a kind of step
        seen 32 times.
        """
        row = np.array(basis.terms(features)) / predicted_s
        return leverage(self._information, row) < 1.0 / _TRUSTED_AFTER

    def _accept(self, change: Change) -> None:
        """Scale what is known of the kinds of step that changed by the factor, and believe less of everything."""
        slower = np.ones(STRATA)
        if change.kinds is None:
            slower[:] = change.ratio
            for scale in self._scales:
                scale.log_ratio += math.log(change.ratio)
        else:
            slower[list(change.kinds)] = change.ratio
        self._gram *= (_KEEP_AT_DRIFT / slower**2)[:, None, None]
        self._moment *= (_KEEP_AT_DRIFT / slower)[:, None]
        self._trend.reset()
        self._level.reset()
        self.epoch += 1
        self._solve()

    def _solve(self) -> None:
        gram, moment = self._gram.sum(axis=0), self._moment.sum(axis=0)
        decode, mixed = self._scales
        slower = [
            math.exp(own.log_ratio if own.steps else _HALF * other.log_ratio)
            for own, other in ((decode, mixed), (mixed, decode))
        ]
        for (prior_gram, prior_moment), ratio in zip(self._priors, slower, strict=True):
            gram += self._prior_weight / ratio**2 * prior_gram
            moment += self._prior_weight / ratio * prior_moment
        pull, centre = self._pull
        gram.flat[:: basis.TERMS + 1] += pull / slower[1] ** 2
        moment += pull / slower[1] * centre
        self._information = gram
        self._weights = solve(gram, moment, self._weights)
        self._renew()

    def _renew(self) -> None:
        decode, mixed = self._bounds
        factors, trend = (decode.factor, mixed.factor), self._trend
        self._curve = Curve(
            self._weights.tolist(),
            self._tokens_seen,
            *factors,
            trend.offset_s,
            trend.at_s,
            self._token_s,
            self._level.factor,
        )


def _pull(curve: Curve) -> tuple[F8, F8]:
    """Strengths with which weights are drawn to values, and those values.

    As if so many observations had shown that a step with enough of its term to count takes what that value says. Hinges
    and steps in the number of tokens are drawn to zero, attention and KV to what the prior says: else the square of a
    prompt's length could pass for a hinge.
    """
    pull, centre = np.full(basis.TERMS, _OTHER), np.zeros(basis.TERMS)
    for first, places, strength in ((basis.FIRST_HINGE, basis.HINGES, _HINGE), (basis.FIRST_STEP, basis.STEPS, _STEP)):
        for i, at in enumerate(places):
            step = StepFeatures(2 * at, 1, 1, 2.0 * at * at, 0)
            pull[first + i] = strength * (basis.terms(step)[first + i] / curve.predict(step).mean_s) ** 2
    for term, step in ((basis.ATTENTION, _LONG_CHUNK), (basis.KV, _LONG_DECODES)):
        pull[term] = _HINGE * (basis.terms(step)[term] / curve.predict(step).mean_s) ** 2
        centre[term] = curve.weights[term]
    return pull, centre


def rebuild_curve(weights: Sequence[float]) -> Curve:
    """The predictor of `OnlineModel.snapshot().weights`.

    Raises:
        ValueError: they are not such weights.
    """
    n = basis.TERMS
    if len(weights) != n + 7:
        raise ValueError(f"a snapshot of {len(weights)} numbers; {n + 7} are needed")
    if (
        not all(map(math.isfinite, weights))
        or min(weights[:n]) < 0.0
        or weights[n] <= 0.0
        or min(weights[n + 1 : n + 3]) < 1.0
        or weights[n + 4] <= 0.0
        or weights[n + 5] < 0.0
        or weights[n + 6] <= 0.0
    ):
        raise ValueError(f"the numbers of a snapshot are out of range: {weights}")
    return Curve(weights[:n], *weights[n:])
