"""How long a step may take so that running requests keep their mean time per token."""

from __future__ import annotations

from typing import NamedTuple

import numpy as np

from nexusengine.arrays import I4, Bools
from nexusengine.scheduler.lens.deadlines import Deadlines
from nexusengine.scheduler.view import EngineView

_INF = float("inf")
_RECOVERY_TOKENS = 100
_LEAST_STEP_SHARE = 0.7  # of its TPOT that a late request asks for at least, or prefill would stand still
_POSSIBLE_STEPS = 1.02  # a TPOT below so many decode steps of a single sequence constrains nobody


class StepLimit(NamedTuple):
    """How long a step may take.

    Attributes:
        limit_s: seconds.
        slot: the request that set it, -1 if the cap did.
        slo_missed: `[D]`, decodes whose SLO is missed already; they constrain nobody.
        tightest_tpot_s: of those that do; inf if there are none.
        burst_s: what they could bear, up to the cap, if they may spend now what they will gain.
    """

    limit_s: float
    slot: int
    slo_missed: Bools
    tightest_tpot_s: float
    burst_s: float = 0.0


def step_limit(
    view: EngineView,
    deadlines: Deadlines,
    decodes: I4,
    now: float,
    *,
    decode_s: float,
    single_s: float,
    cap_s: float,
    floor_tokens: int = 0,
) -> StepLimit:
    """How long a step may take for the sake of the decodes in it.

    With the first token at f and g tokens there, the token of this step is due at f + g * tpot, which leaves s seconds:
    s < tpot is late, s > tpot early. A request has missed its SLO if its first token came late, or if it is so late
    that it could not make it good within as many tokens again as it has, plus 100, were they all decoded at full speed.
    What it will gain is the lead of decoding alone until it has floor_tokens. Those without an SLO bear any step.

    Args:
        decodes: `[D]`, slots that compute one token in this step.
        decode_s, single_s: predicted durations of a step with those decodes alone, and of one with a single decode.
        cap_s: the longest step whatever these decodes bear (see step_cap.py); infinite if there is no such bound.
        floor_tokens: what almost every answer reaches; 0 if nothing is known.
    """
    c = view.columns
    if not len(decodes):
        return StepLimit(cap_s, -1, np.zeros(0, np.bool_), _INF)
    first_s, generated, tpot_s = c.first_token_s[decodes], c.generated_tokens[decodes], deadlines.tpot_s[decodes]
    promised = tpot_s < _INF
    if np.count_nonzero(promised) < len(promised):
        limit = step_limit(
            view,
            deadlines,
            decodes[promised],
            now,
            decode_s=decode_s,
            single_s=single_s,
            cap_s=cap_s,
            floor_tokens=floor_tokens,
        )
        all_missed = np.zeros(len(decodes), np.bool_)
        all_missed[promised] = limit.slo_missed
        return limit._replace(slo_missed=all_missed)
    slack_s = first_s + (generated * tpot_s - now)  # NaN before the first token
    missed: Bools = first_s > deadlines.first_due_s[decodes]
    if np.fmin.reduce(slack_s) < decode_s:
        missed |= slack_s - decode_s < np.minimum((decode_s - tpot_s) * (generated + _RECOVERY_TOKENS), 0.0)
    bound = ~missed & (tpot_s > _POSSIBLE_STEPS * single_s) & (generated > 0)
    bounds = np.count_nonzero(bound)
    if not bounds:
        return StepLimit(cap_s, -1, missed, _INF, cap_s)
    if bounds < len(bound):
        decodes, slack_s, tpot_s, generated = (x[bound] for x in (decodes, slack_s, tpot_s, generated))
    asked_s, burst_s = np.maximum(slack_s, _LEAST_STEP_SHARE * tpot_s), slack_s
    if np.count_nonzero(generated < floor_tokens):
        burst_s = slack_s + np.maximum(floor_tokens - generated, 0) * np.maximum(tpot_s - decode_s, 0.0)
    tightest = int(asked_s.argmin())
    limit_s, tightest_tpot_s = float(asked_s[tightest]), float(tpot_s.min())
    least_burst_s = min(float(burst_s.min()), cap_s)
    if limit_s >= cap_s:
        return StepLimit(cap_s, -1, missed, tightest_tpot_s, least_burst_s)
    return StepLimit(limit_s, int(decodes[tightest]), missed, tightest_tpot_s, least_burst_s)
