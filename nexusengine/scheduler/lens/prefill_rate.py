"""How fast prompts can be served beside the decodes there are, and whether a step should serve any.

A step with prompts takes longer than its decodes and its prompts each for themselves: `extra_s`, for attention of
decodes that is slower in mixed steps and for kernels that do not fit a captured graph. Of two ways to spend the time
that decodes leave, many short mixed steps or a few long ones between decode-only steps, the second pays it less often:
prefills are coalesced.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from nexusengine.arrays import F8, I4
from nexusengine.perf.features import StepFeatures
from nexusengine.perf.model import Predictor
from nexusengine.scheduler.lens.step_limit import StepLimit

_SMALL_CHUNK = 16
_PROBE_CONTEXT = 1024
_PROBE_PAIRS = 1e6
_LEAST_SHARE = 0.05  # of a step that is reckoned to be left for prompts, however many decodes there are
_LEAST_GAIN_S = 0.002  # of one decode-only step, below which coalescing is not worth a step
_LEAST_OF_STEP = 0.7  # after which a step may end in an overload for the sake of who is due then
_SLACK = 0.02  # share of every limit that is kept


@dataclass(frozen=True, slots=True)
class MarginalCosts:
    """What more of something costs in steps like the present ones. Seconds.

    Attributes:
        single_s: a step with one decode.
        token_s, pair_s, prompt_s: one more prompt token, query-key pair, and prompt in a mixed step.
        sequence_s, kv_token_s: one more sequence, and one more KV token read, in a decode step.
    """

    single_s: float
    token_s: float
    pair_s: float
    prompt_s: float
    sequence_s: float
    kv_token_s: float

    def work_s(self, context: I4, left: I4) -> F8:
        """Of the rest of prompts: `left [N]` tokens behind `context [N]` tokens in the KV cache."""
        work: F8 = left * (self.token_s + self.pair_s * (context + 0.5 * left)) + self.prompt_s
        return work


def marginal_costs(model: Predictor, base: StepFeatures, chunk: int) -> MarginalCosts:
    """base: the decodes of a step. chunk: tokens of prompts in a step, about."""
    rows, kv = base.sequences, base.decode_kv_tokens

    def mixed_s(q: int, prompts: int, pairs: float) -> float:
        return model.predict(StepFeatures(rows + q, rows + prompts, prompts, pairs, kv)).mean_s

    def decode_s(n: int, kv_tokens: int) -> float:
        return model.predict(StepFeatures(n, n, 0, 0.0, kv_tokens)).mean_s

    small_s, all_s = mixed_s(_SMALL_CHUNK, 1, 0.0), decode_s(rows, kv)
    return MarginalCosts(
        single_s=decode_s(1, _PROBE_CONTEXT),
        token_s=(mixed_s(_SMALL_CHUNK + chunk, 1, 0.0) - small_s) / chunk,
        pair_s=(mixed_s(_SMALL_CHUNK, 1, _PROBE_PAIRS) - small_s) / _PROBE_PAIRS,
        prompt_s=max(mixed_s(_SMALL_CHUNK, 2, 0.0) - small_s, 0.0),
        sequence_s=decode_s(rows + 1, kv) - all_s,
        kv_token_s=(decode_s(rows, kv + 16 * _PROBE_CONTEXT) - all_s) / (16 * _PROBE_CONTEXT),
    )


@dataclass(frozen=True, slots=True)
class PrefillRate:
    """How fast prompts can be served under a step limit. Seconds.

    Attributes:
        decode_s: predicted duration of this step's decodes alone.
        extra_s: what prompts cost beside their own work.
        step_s: what the mean duration of this step must stay within; prompts_s: of it for prompts.
        gain_s: what each decode-only step adds to the next step's limit; target_s: the step worth waiting for.
        first_s, first_prompts_s: how long until a step with prompts has ended if work is coalesced, and its time for
            prompts.
        slowdown: seconds that pass for one second of prompts' work in the long run after that; eager_slowdown: the same
            if nothing is coalesced.
    """

    decode_s: float
    extra_s: float
    step_s: float
    prompts_s: float
    gain_s: float
    target_s: float
    first_s: float
    first_prompts_s: float
    slowdown: float
    eager_slowdown: float

    @property
    def coalesces(self) -> bool:
        """Whether the limit would grow much towards the target if this step were decode-only."""
        return self.gain_s > _LEAST_GAIN_S and self.step_s + 0.5 * self.gain_s < self.target_s

    def work_until(self, slack_s: F8) -> F8:
        """How much of prompts' work can be done within `slack_s [N]` from now.

        In steps from right now on, or in the coalesced one and those that follow.
        """
        return self._work_until(slack_s, np.minimum(slack_s - (self.decode_s + self.extra_s), self.prompts_s))

    def work_in_whole_steps(self, slack_s: F8) -> F8:
        """The same if no step is ended very early for those who are due soon, which costs throughput.

        A prompt that does not end in the first step waits for the end of the one in which it does: only the work of the
        whole steps until its deadline is sure to be done.
        """
        first_s = np.minimum(slack_s - (self.decode_s + self.extra_s), self.prompts_s)
        first_s = np.where(slack_s >= _LEAST_OF_STEP * self.step_s, first_s, 0.0)
        return self._work_until(slack_s - self.step_s, first_s)

    def _work_until(self, slack_s: F8, first_s: F8) -> F8:
        """first_s: `[N]`, work of the first step, if it is not coalesced."""
        eager_s = first_s + np.maximum(slack_s - self.step_s, 0.0) / self.eager_slowdown
        rest_s = slack_s - self.first_s
        work_s: F8 = np.maximum(
            eager_s, np.where(rest_s >= 0.0, rest_s / self.slowdown + self.first_prompts_s, eager_s)
        )
        return work_s


def mixing_cost_s(model: Predictor, base: StepFeatures, decode_s: float) -> float:
    small = StepFeatures(base.tokens + _SMALL_CHUNK, base.sequences + 1, 1, 0.0, base.decode_kv_tokens)
    return max(model.predict(small).mean_s - decode_s, 0.0)


def prefill_rate(
    limit: StepLimit, decode_s: float, extra_s: float, *, factor: float, coalescing: float, cap_s: float
) -> PrefillRate:
    """The rate at which prompts can be served under a step limit.

    In the long run, decode-only steps and steps of target_s alternate so that a token takes tightest_tpot_s in the
    mean: each decode-only step leaves gain_s, and the step with prompts takes target_s - decode_s out of them. Without
    coalescing, every step takes tightest_tpot_s.

    Args:
        limit: of this step.
        decode_s, extra_s: see PrefillRate.
        factor: limits are divided by it, for the sake of steps that take longer than predicted.
        coalescing, cap_s: see LensOptions.
    """
    keep = (1.0 - _SLACK) / factor
    step_s = keep * limit.limit_s
    prompts_s = max(step_s - decode_s - extra_s, _LEAST_SHARE * step_s)
    tpot_s = keep * min(limit.tightest_tpot_s, cap_s)
    gain_s = tpot_s - decode_s
    eager = slowdown = tpot_s / max(gain_s - extra_s, _LEAST_SHARE * tpot_s)
    target_s = min(keep * cap_s, decode_s + coalescing * extra_s)
    if not coalescing or gain_s < _LEAST_GAIN_S or limit.tightest_tpot_s == float("inf") or target_s <= tpot_s:
        return PrefillRate(decode_s, extra_s, step_s, prompts_s, 0.0, 0.0, step_s, prompts_s, eager, eager)
    target_prompts_s = max(target_s - decode_s - extra_s, _LEAST_SHARE * target_s)  # the cap may leave less than that
    slowdown = min(slowdown, tpot_s * (target_s - decode_s) / (gain_s * target_prompts_s))
    if step_s + 0.5 * gain_s >= target_s:
        return PrefillRate(decode_s, extra_s, step_s, prompts_s, gain_s, target_s, step_s, prompts_s, slowdown, eager)
    first_s = (target_s - step_s) / gain_s * decode_s + target_s
    return PrefillRate(
        decode_s, extra_s, step_s, prompts_s, gain_s, target_s, first_s, target_prompts_s, slowdown, eager
    )


def fixed_rate(model: Predictor, base: StepFeatures, tokens: int, decode_s: float, extra_s: float) -> PrefillRate:
    """Of steps that are limited by their tokens alone; tokens: those left for prompts."""
    full = StepFeatures(base.tokens + max(tokens, 1), base.sequences + 1, 1, 0.0, base.decode_kv_tokens)
    step_s = model.predict(full).mean_s
    prompts_s = max(step_s - decode_s - extra_s, _LEAST_SHARE * step_s)
    slowdown = step_s / prompts_s
    return PrefillRate(decode_s, extra_s, float("inf"), prompts_s, 0.0, 0.0, step_s, prompts_s, slowdown, slowdown)
