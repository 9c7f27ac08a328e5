"""The predictor of the online model: its weights, made ready for microsecond predictions.

What depends on the number of tokens alone is one piecewise-linear, rising function of T for decode-only and one for
mixed steps; the rest is linear. A prediction is one search in a short list and a few multiplications.
"""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Sequence

import numpy as np

from nexusengine.arrays import F8
from nexusengine.perf import basis
from nexusengine.perf.basis import KV_TOKENS, PAIRS, TOKENS
from nexusengine.perf.features import SHORTEST_S, StepFeatures
from nexusengine.perf.model import StepTime

_MEAN_SHARE = 0.65  # of the mean time per token in the slope beyond, on a logarithmic scale; the rest is the octave's
_NEAR_OCTAVE, _NEAR_MEAN, _MEASURED_SHARE = 0.9, 1.15, 2 / 3
_WAITING, _COMPUTING = 0.68, 0.85  # octave over mean of a device that does not compute yet, and of one that does


class _Tokens:
    """A rising, piecewise-linear function of T, in seconds; piece i holds for breaks[i-1] < T <= breaks[i].

    Args:
        weights: in the order of `basis`.
        steps: seconds by which it rises behind a number of tokens.
        seen: the most tokens seen in a step.
        token_s: seconds for each token of far larger steps, as the prior has it; 0: it has nothing.
        slope_beyond: seconds a token beyond `seen`, besides what hinges and steps add; None: it is estimated.
    """

    def __init__(
        self,
        weights: Sequence[float],
        steps: dict[float, float],
        seen: float,
        token_s: float = 0.0,
        slope_beyond: float | None = None,
    ) -> None:
        hinges: dict[float, float] = {h: weights[basis.FIRST_HINGE + i] / TOKENS for i, h in enumerate(basis.HINGES)}
        self.breaks: list[float] = []
        self.starts, self.slopes = [0.0], [weights[basis.SLOPE] / TOKENS]
        self.values = [weights[basis.ONE] + steps.get(0.0, 0.0)]
        slope = self.slopes[0]
        for at in sorted({seen, *hinges, *steps} - {0.0}):
            value = self(at)
            if at == seen:
                slope = self._slope_beyond(seen, token_s) if slope_beyond is None else slope_beyond
                self.slope_beyond = slope
            slope += hinges.get(at, 0.0)
            self.breaks.append(at)
            self.starts.append(at)
            self.values.append(value + steps.get(at, 0.0))
            self.slopes.append(slope)
        self._arrays: tuple[F8, ...] = ()

    def _slope_beyond(self, seen: float, token_s: float) -> float:
        """Seconds for each token beyond the most seen. Weights that were fitted up to there say little of it.

        On a roofline, time = overhead + max(moving weights, tokens * c), it is c. Where the device computes already,
        the mean time per token is above c by the overhead; the secant of the last octave is c itself, but kernels lose
        a few percent per token as steps grow (clocks fall under power limits, caches overflow), which the mean makes up
        for. Where it still moves weights, or waits for the host, the octave is far below the mean, and says more. What
        was measured of such devices counts for two thirds, as far as it is near the two.
        """
        end, half = self(seen), self(seen / 2)
        octave, mean = (end - half) / (seen / 2), end / seen
        slope = octave
        if octave < mean:
            share = _MEAN_SHARE * min(max((octave / mean - _WAITING) / (_COMPUTING - _WAITING), 0.0), 1.0)
            slope = mean**share * octave ** (1.0 - share)
        if token_s > 0.0:
            low, high = _NEAR_OCTAVE * min(octave, mean), _NEAR_MEAN * max(octave, mean)
            slope = slope ** (1.0 - _MEASURED_SHARE) * min(max(token_s, low), high) ** _MEASURED_SHARE
        return slope

    def __call__(self, tokens: float) -> float:
        i = bisect_left(self.breaks, tokens)
        return self.values[i] + self.slopes[i] * (tokens - self.starts[i])

    def many(self, tokens: F8) -> F8:
        if not self._arrays:
            self._arrays = tuple(map(np.array, (self.breaks, self.starts, self.values, self.slopes)))
        breaks, starts, values, slopes = self._arrays
        i = breaks.searchsorted(tokens)
        result: F8 = values[i] + slopes[i] * (tokens - starts[i])
        return result


class Curve:
    """Predictor; a mixed step takes no less than the same step without prompts.

    Args:
        weights: `[TERMS]` in the order of `basis`, not negative.
        seen: the most tokens seen in a step, > 0.
        factor_decode: from the mean to the upper bound of decode-only steps, >= 1.
        factor_mixed: as that, of mixed steps.
        offset_s: what decode-only steps of about offset_at_s seconds take more, of late, than the weights say; shorter
            ones a like share of it.
        offset_at_s: see offset_s.
        token_s: seconds for each token of steps far larger than seen, by the prior; 0: it says nothing.
        level: how many times as long as that steps of all kinds take of late, > 0.
    """

    def __init__(
        self,
        weights: Sequence[float],
        seen: float,
        factor_decode: float = 1.0,
        factor_mixed: float = 1.0,
        offset_s: float = 0.0,
        offset_at_s: float = 1.0,
        token_s: float = 0.0,
        level: float = 1.0,
    ) -> None:
        self.weights, self.seen, self.token_s, self.level = tuple(weights), seen, token_s, level
        self.factor_decode, self.factor_mixed = factor_decode, factor_mixed
        self.offset_s, self.offset_at_s = offset_s, offset_at_s
        steps = {0.0: weights[basis.MIXED]}
        steps |= {s: weights[basis.FIRST_STEP + i] for i, s in enumerate(basis.STEPS)}
        self._mixed = _Tokens(weights, steps, seen, token_s)
        self._decode = _Tokens(weights, {}, seen, slope_beyond=self._mixed.slope_beyond)
        self._mixed_s = weights[basis.MIXED]
        self._sequence_s, self._prefill_s = weights[basis.SEQUENCES], weights[basis.PREFILLS]
        self._pair_s, self._kv_s = weights[basis.ATTENTION] / PAIRS, weights[basis.KV] / KV_TOKENS
        self._mixed_kv_s = (weights[basis.KV] + weights[basis.MIXED_KV]) / KV_TOKENS

    @property
    def numbers(self) -> tuple[float, ...]:
        """The arguments it was made from, in that order."""
        factors = self.factor_decode, self.factor_mixed
        return (*self.weights, self.seen, *factors, self.offset_s, self.offset_at_s, self.token_s, self.level)

    def predict(self, features: StepFeatures) -> StepTime:
        mean_s, offset_s, mixed = self.plain_s(features), self.offset_s, features.prefills > 0
        if mean_s < self.offset_at_s:
            offset_s *= mean_s / self.offset_at_s
        if not mixed:
            mean_s += offset_s
        elif offset_s > self._mixed_s:
            mean_s += offset_s - self._mixed_s
        mean_s *= self.level
        if mean_s < SHORTEST_S:
            mean_s = SHORTEST_S
        return StepTime(mean_s, mean_s * (self.factor_mixed if mixed else self.factor_decode))

    def plain_s(self, f: StepFeatures) -> float:
        """The mean by the weights alone, without offset and level."""
        tokens, sequences, prefills, pairs, kv = f
        by_tokens = self._mixed if prefills else self._decode
        i = bisect_left(by_tokens.breaks, tokens)
        tokens_s = by_tokens.values[i] + by_tokens.slopes[i] * (tokens - by_tokens.starts[i])
        if prefills:
            prompts_s = tokens_s + self._sequence_s * sequences + self._prefill_s * prefills
            return prompts_s + self._pair_s * pairs + self._mixed_kv_s * kv
        return tokens_s + self._sequence_s * sequences + self._kv_s * kv

    def mean_s(self, tokens: F8, sequences: F8, prefills: F8, prefill_attention: F8, decode_kv_tokens: F8) -> F8:
        mixed = np.asarray(prefills) > 0
        chunks_s = self._prefill_s * prefills + self._pair_s * prefill_attention
        if mixed.all():  # as is usual
            plain_s = self._mixed.many(tokens) + self._sequence_s * sequences + chunks_s
            plain_s = plain_s + self._mixed_kv_s * decode_kv_tokens
        else:
            plain_s = (
                np.where(mixed, self._mixed.many(tokens), self._decode.many(tokens))
                + self._sequence_s * sequences
                + np.where(mixed, chunks_s, 0.0)
                + np.where(mixed, self._mixed_kv_s, self._kv_s) * decode_kv_tokens
            )
        if self.offset_s:
            offset_s = self.offset_s * np.minimum(plain_s / self.offset_at_s, 1.0)
            plain_s = plain_s + np.where(mixed, np.maximum(offset_s - self._mixed_s, 0.0), offset_s)
        result: F8 = np.maximum(plain_s * self.level, SHORTEST_S)
        return result
