"""How long a step may take so that running requests keep their mean time per token."""

from __future__ import annotations

from dataclasses import dataclass, replace

import numpy as np

from nexusengine.arrays import I4, Bools
from nexusengine.scheduler.lens.deadlines import Deadlines
from nexusengine.scheduler.view import EngineView

_INF = float("inf")
_RECOVERY_TOKENS = 100


@dataclass(frozen=True, slots=True)
class LimitRules:
    """cap_s, cap_steps: the longest step whatever the promises, so that a newcomer does not wait behind a huge one: the
    larger of cap_s and cap_steps single-token steps. catch_up: a request that is behind asks for steps of this share of
    its tpot, no shorter, or prefill would stand still. bank: the share of its lead that a request gives to one step.
    possible: a tpot below this many decode steps of a single sequence constrains nobody."""

    cap_s: float = 0.120
    cap_steps: float = 2.5
    catch_up: float = 0.7
    bank: float = 1.0
    possible: float = 1.02

    def longest_s(self, single_s: float) -> float:
        return max(self.cap_s, self.cap_steps * single_s)


@dataclass(frozen=True, slots=True)
class StepLimit:
    """limit_s: of the step. slot: the request that set it, -1 if the cap did. lost `[D]`: of the decodes, whose promise
    is lost already; they constrain nobody. tightest_tpot_s: of those that do; inf if there are none. once_s: what
    they could bear, up to the cap, if they may spend now what they will gain."""

    limit_s: float
    slot: int
    lost: Bools
    tightest_tpot_s: float
    once_s: float = 0.0


def step_limit(
    view: EngineView,
    deadlines: Deadlines,
    decodes: I4,
    now: float,
    decode_s: float,
    single_s: float,
    rules: LimitRules,
    sure_tokens: int = 0,
) -> StepLimit:
    """decodes `[D]`: slots that compute one token in this step. decode_s, single_s: predicted durations of a step with
    those decodes alone, and of one with a single decode. sure_tokens: what almost every answer reaches; 0 if nothing is
    known.

    With the first token at f and g tokens there, the token of this step is due at f + g * tpot, which leaves s seconds:
    s < tpot is behind, s > tpot ahead. A request is lost if its first token came late, or if it is so far behind that
    it could not make it good within as many tokens again as it has, plus 100, were they all decoded at full speed.
    What it will gain is the lead of decoding alone until it has sure_tokens. Those without an SLO bear any step.
    """
    c = view.columns
    cap_s = rules.longest_s(single_s)
    if not len(decodes):
        return StepLimit(cap_s, -1, np.zeros(0, np.bool_), _INF)
    first_s, generated, tpot_s = c.first_token_s[decodes], c.generated_tokens[decodes], deadlines.tpot_s[decodes]
    promised = tpot_s < _INF
    if np.count_nonzero(promised) < len(promised):
        limit = step_limit(view, deadlines, decodes[promised], now, decode_s, single_s, rules, sure_tokens)
        all_lost = np.zeros(len(decodes), np.bool_)
        all_lost[promised] = limit.lost
        return replace(limit, lost=all_lost)
    slack_s = first_s + (generated * tpot_s - now)  # NaN before the first token
    lost: Bools = first_s > deadlines.first_due_s[decodes]
    if np.fmin.reduce(slack_s) < decode_s:
        lost |= slack_s - decode_s < np.minimum((decode_s - tpot_s) * (generated + _RECOVERY_TOKENS), 0.0)
    asked_s = slack_s
    if rules.bank < 1.0:
        asked_s = np.minimum(slack_s, rules.bank * slack_s + (1.0 - rules.bank) * tpot_s)
    asked_s = np.maximum(asked_s, rules.catch_up * tpot_s)
    bound = ~lost & (tpot_s > rules.possible * single_s) & (generated > 0)
    once_s = slack_s
    if sure_tokens:
        once_s = slack_s + np.maximum(sure_tokens - generated, 0) * np.maximum(tpot_s - decode_s, 0.0)
    if np.count_nonzero(bound) < len(bound):
        asked_s, once_s, tpot_s = (np.where(bound, x, _INF) for x in (asked_s, once_s, tpot_s))
    tightest = int(asked_s.argmin())
    limit_s, least_once_s = float(asked_s[tightest]), min(float(once_s.min()), cap_s)
    if limit_s >= cap_s:
        return StepLimit(cap_s, -1, lost, float(tpot_s.min()), least_once_s)
    return StepLimit(limit_s, int(decodes[tightest]), lost, float(tpot_s.min()), least_once_s)
