"""How fast prompts can be served beside the decodes there are, and whether a step should serve any.

A step with prompts takes longer than its decodes and its prompts each for themselves: `extra_s`, for attention of
decodes that is slower in mixed steps and for kernels that do not fit a captured graph. Of two ways to spend the time
that decodes leave, many short mixed steps or a few long ones between decode-only steps, the second pays it less often.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from nexusengine.lens.limit import StepLimit
from nexusengine.lens.view import F8, I4
from nexusengine.perf.features import StepFeatures
from nexusengine.perf.model import Predictor

_KV_PROBE_TOKENS = 1000.0
_SMALL_CHUNK = 16.0
_LEAST_SHARE = 0.05  # of a step that is reckoned to be left for prompts, however many decodes there are
_LEAST_GAIN_S = 0.002  # of one decode-only step, below which saving up is not worth a step


@dataclass(frozen=True, slots=True)
class Outlook:
    """Predicted seconds. single_s: a step with one decode. decode_s: the decodes of this step alone. extra_s: what
    prompts cost beside their own work. work_s `[N]`: what the rest of each prompt adds to a mixed step.

    started_s, per_sequence_s, per_kv_token_s: the decode step with everyone who runs started, and what one more
    sequence and one more KV token add to it.
    """

    single_s: float
    decode_s: float
    extra_s: float
    work_s: F8
    started_s: float
    per_sequence_s: float
    per_kv_token_s: float


def look_ahead(
    model: Predictor, base: StepFeatures, started: int, started_kv_tokens: int, context: I4, left: I4
) -> Outlook:
    """base: the decodes of this step. started, started_kv_tokens: prompts that have begun and their known tokens.
    context, left `[N]`: of prompts, tokens in their KV cache when they compute next and tokens left. One call of the
    model for everything."""
    n = len(left)
    rows = float(base.sequences)
    kv_tokens = float(base.decode_kv_tokens)
    all_rows, all_kv = rows + started, kv_tokens + started_kv_tokens
    tokens, sequences, prefills, attention, kv = columns = np.empty((5, n + 6))
    columns[:, :6] = (
        (1.0, rows, all_rows, all_rows + 1.0, all_rows, rows + _SMALL_CHUNK),
        (1.0, rows, all_rows, all_rows + 1.0, all_rows, rows + 1.0),
        (0.0, 0.0, 0.0, 0.0, 0.0, 1.0),
        (0.0, 0.0, 0.0, 0.0, 0.0, 0.0),
        (1.0, kv_tokens, all_kv, all_kv, all_kv + _KV_PROBE_TOKENS, kv_tokens),
    )
    tokens[6:] = left
    attention[6:] = (0.5 * tokens[6:] + context) * tokens[6:]
    tokens[6:] += rows + _SMALL_CHUNK
    sequences[6:] = rows + 2.0
    prefills[6:] = 2.0
    kv[6:] = kv_tokens
    seconds = model.mean_s(tokens, sequences, prefills, attention, kv)
    single_s, decode_s, started_s, one_more_s, longer_s, mixed_s = seconds[:6].tolist()
    return Outlook(
        single_s=single_s,
        decode_s=decode_s,
        extra_s=max(mixed_s - decode_s, 0.0),
        work_s=seconds[6:] - mixed_s,
        started_s=started_s,
        per_sequence_s=one_more_s - started_s,
        per_kv_token_s=(longer_s - started_s) / _KV_PROBE_TOKENS,
    )


@dataclass(frozen=True, slots=True)
class Pace:
    """step_s: what the mean duration of this step must stay within; prompts_s: of it for prompts. gain_s: what each
    decode-only step adds to the next step's limit. target_s: the step worth saving up for. dilution: seconds that pass
    for one second of prompts' work. margin_s: prompts' work in one cycle of steps."""

    step_s: float
    prompts_s: float
    gain_s: float
    target_s: float
    dilution: float
    margin_s: float

    @property
    def saves(self) -> bool:
        """Whether the limit would grow much towards the target if this step were decode-only."""
        return self.gain_s > _LEAST_GAIN_S and self.step_s + 0.5 * self.gain_s < self.target_s


def pace_of(limit: StepLimit, outlook: Outlook, factor: float, slack: float, saving: float, cap_s: float) -> Pace:
    """factor: limits are divided by it, for the sake of steps that take longer than predicted. slack: share of every
    limit that is kept. saving: steps with prompts are saved up for until extra_s is at most 1 / saving of what they
    have beyond the decodes; 0: never.

    In the long run decode-only steps of decode_s and steps of target_s alternate so that a token takes tightest_tpot_s
    in the mean; `cycle` decode-only steps and one with prompts make one cycle.
    """
    decode_s, extra_s = outlook.decode_s, outlook.extra_s
    keep = (1.0 - slack) / factor
    step_s = keep * limit.limit_s
    prompts_s = max(step_s - decode_s - extra_s, _LEAST_SHARE * step_s)
    dilution = step_s / prompts_s
    if not saving or limit.tightest_tpot_s == float("inf"):
        return Pace(step_s, prompts_s, 0.0, 0.0, dilution, prompts_s)
    gain_s = keep * limit.tightest_tpot_s - decode_s
    target_s = min(keep * cap_s, decode_s + saving * extra_s)
    margin_s = prompts_s
    if gain_s > _LEAST_GAIN_S:
        cycle_steps = (target_s - decode_s) / gain_s
        long_run = cycle_steps * keep * limit.tightest_tpot_s / max(target_s - decode_s - extra_s, 1e-9)
        if cycle_steps > 1.0 and long_run < dilution:
            dilution, margin_s = long_run, target_s - decode_s - extra_s
    return Pace(step_s, prompts_s, gain_s, target_s, dilution, margin_s)
