"""What each request was promised, as timestamps: when its first token and when its next token are due.

The promise is the mean one of slo/due.py: the first token by arrival + ttft_s; and with the first token at f, the mean
time of each further token within tpot_s, so that output token g (from 0) is due at f + g * tpot_s.

A bound on the whole response is kept by the length that the answer is expected to have (scheduler.output_lengths):
what it leaves for each further token. Where that is not much more than a decode step, the answer is one of the long
ones that cannot be kept, and holds nobody up.

A request without an SLO has no deadline: its timestamps are infinite, so that it is never late, never relegated or
refused for that, and sets no limit to a step. It is served behind all deadlines, in order of arrival. One whose SLO the
device could not meet even alone is served as if it had been promised `FALLBACK`.
"""

from __future__ import annotations

import numpy as np

from nexusengine.arrays import F8, I4
from nexusengine.scheduler.attainable import attainable
from nexusengine.scheduler.view import EngineView
from nexusengine.slo.classes import CLASSES
from nexusengine.slo.due import first_tokens_due_s

FALLBACK = CLASSES["batch"]
"""The promise in place of one that cannot be kept: generous, but finite, so that the wait stays bounded."""
NO_SLO_TURN_S = FALLBACK.ttft_s
"""Seconds after its arrival at which it is the turn of a request without an SLO; see `turn_s`."""

_E2E_LEAST_STEPS = 1.3  # present decode steps that an e2e bound leaves for a token, or it is not kept any more
_RESUME_TOKENS = 64
_RESUME_SHARE = 0.25


def turn_s(arrival_s: F8, first_due_s: F8) -> F8:
    """Timestamps from which waiting counts as too long.

    When the first token is due, or NO_SLO_TURN_S after its arrival where it is due at no time. Nobody is late by it; it
    keeps those who have no deadline from starving.

    Returns:
        Timestamps, `[N]`.
    """
    turn: F8 = np.where(np.isinf(first_due_s), arrival_s + NO_SLO_TURN_S, first_due_s)
    return turn


class Deadlines:
    """Deadlines by slot `[S]`, kept between steps: work only for requests that are new. Infinite without an SLO.

    Attributes:
        first_due_s: when the first token is due.
        prefill_due_s: the same, but for a request that was preempted while it generated the timestamp of its next token
            and some grace, because the mean can still be made good.
        tpot_s: bound of the mean time per token.
        turn_s: see the function.
        attainable: False where the device could not meet the SLO even alone, judged once, at arrival.
    """

    def __init__(self, slots: int) -> None:
        self.first_due_s = np.full(slots, np.inf)
        self.prefill_due_s = np.full(slots, np.inf)
        self.tpot_s = np.full(slots, np.inf)
        self.turn_s = np.full(slots, np.inf)
        self.attainable = np.ones(slots, np.bool_)
        self._arrival_s = np.full(slots, np.nan)
        self._any_e2e = False

    def update(self, view: EngineView, slots: I4) -> I4:
        """Bring the rows of `slots` up to date; returns those of them that are new."""
        c = view.columns
        new: I4 = slots[self._arrival_s[slots] != c.arrival_s[slots]]
        if len(new):
            self._enter(view, new)
        resumed = slots[c.generated_tokens[slots] > 0]
        if len(resumed):
            generated, tpot_s = c.generated_tokens[resumed], self.tpot_s[resumed]
            grace_s = _RESUME_SHARE * tpot_s * (generated + _RESUME_TOKENS)
            self.prefill_due_s[resumed] = c.first_token_s[resumed] + generated * tpot_s + grace_s
        return new

    def renew_e2e(self, view: EngineView, decodes: I4, decode_s: float) -> None:
        """What bounds on whole responses leave for each further token of `decodes [D]`. decode_s: of a decode step."""
        c = view.columns
        slots = decodes[~np.isnan(c.e2e_s[decodes])] if self._any_e2e else decodes[:0]
        if not len(slots):
            return
        tokens = np.fmax(c.expected_tokens[slots], c.generated_tokens[slots] + 1.0)
        left_s = c.arrival_s[slots] + c.e2e_s[slots] - c.first_token_s[slots]
        tpot_s = np.where(self.attainable[slots], c.tpot_s[slots], FALLBACK.tpot_s)
        by_e2e_s = left_s / np.maximum(tokens - 1.0, 1.0)
        by_e2e_s[by_e2e_s < _E2E_LEAST_STEPS * decode_s] = np.inf
        self.tpot_s[slots] = np.fmin(tpot_s, by_e2e_s)

    def _enter(self, view: EngineView, new: I4) -> None:
        c = view.columns
        prompt, ttft_s, tpot_s = c.prompt_tokens[new], np.fmin(c.ttft_s[new], c.e2e_s[new]), c.tpot_s[new]
        self._any_e2e = self._any_e2e or not np.isnan(c.e2e_s[new]).all()
        cached = np.where(c.generated_tokens[new] > 0, 0, c.cached_tokens[new])
        to_compute = (prompt - cached).astype(np.float64)
        met = attainable(view.model, view.max_batch_tokens, to_compute, ttft_s, tpot_s)
        ttft_s = np.where(met, ttft_s, FALLBACK.ttft_s + FALLBACK.ttft_per_token_s * prompt)
        self.attainable[new] = met
        self.tpot_s[new] = np.where(np.isnan(tpot_s), np.inf, np.where(met, tpot_s, FALLBACK.tpot_s))
        self.first_due_s[new] = self.prefill_due_s[new] = first_tokens_due_s(c.arrival_s[new], ttft_s)
        self.turn_s[new] = turn_s(c.arrival_s[new], self.first_due_s[new])
        self._arrival_s[new] = c.arrival_s[new]
