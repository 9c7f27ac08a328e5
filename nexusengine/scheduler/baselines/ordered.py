"""Policies with a fixed token budget a step, which differ in whom they serve first: baselines of LENS.

Decodes always go first, prompts are cut into chunks (the stall-free schedule of Sarathi-Serve, arXiv 2403.02310).
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import Literal

import numpy as np

from nexusengine.arrays import F8, I4, Bools
from nexusengine.scheduler.baselines.fcfs import FCFS, by_tokens, make_room_for_the_oldest
from nexusengine.scheduler.lens.deadlines import turn_s
from nexusengine.scheduler.plan import Reason, StepPlan
from nexusengine.scheduler.step import Step
from nexusengine.scheduler.view import EngineView
from nexusengine.slo.due import first_tokens_due_s


class Sarathi(FCFS):
    """First come, first served with the small budget that keeps decodes from stalling."""

    name = "sarathi"

    def __init__(self, budget: float = 512) -> None:
        super().__init__(budget)


class Ordered(FCFS, ABC):
    """Partially prefilled and waiting prompts in one order: smallest key first.

    Args:
        budget: tokens a step.
        relegate: whether those whose first token cannot come in time any more, by the performance model, go after all
            others, oldest first.
    """

    by: Literal["deadline", "shortest"]

    def __init__(self, budget: float | None = None, relegate: float = 0) -> None:
        super().__init__(budget)
        self.relegate = bool(relegate)
        self.traits = by_tokens(self.by, self.budget, relegates=self.relegate)

    @abstractmethod
    def key(self, view: EngineView, slots: I4, left: I4, due_s: F8) -> F8:
        """What to sort slots by.

        Args:
            slots: `[N]`.
            left: `[N]`, prompt tokens to compute.
            due_s: `[N]`, timestamps at which first tokens are due, infinite without an SLO.
        """

    def plan(self, view: EngineView, now: float) -> StepPlan:
        c = view.columns
        step = Step(view, self.budget)
        step.take_decodes(view.running[::-1].tolist())
        pending, context, left = step.pending()
        due_s = first_tokens_due_s(c.arrival_s[pending], c.ttft_s[pending])
        key = self.key(view, pending, left, due_s)
        lost: I4 = pending[:0]
        if self.relegate and len(pending):
            behind = c.relegated[pending] | too_late(step, left, context, due_s - now)
            lost = pending[behind & ~c.relegated[pending]]
            order = np.lexsort((np.where(behind, c.arrival_s[pending], key), behind))
        else:
            order = np.argsort(key, kind="stable")
        self._fill(step, pending[order].tolist())
        if step.empty and step.prompts:
            make_room_for_the_oldest(step)
        return step.plan(relegate=tuple(lost.tolist()))

    def _fill(self, step: Step, order: list[int]) -> None:
        """The first waiting request that cannot start holds back those after it."""
        partial = set(step.prompts)
        held = Reason.WAIT_BLOCKS if step.preempted else Reason.NONE
        for slot in order:
            if slot in partial:
                step.extend(slot)
                continue
            if held is Reason.NONE:
                held = step.admissible(slot)
            if held is Reason.NONE:
                step.admit(slot)
            else:
                step.reasons[slot] = held


class EDF(Ordered):
    """Earliest deadline of the first token first; without an SLO, when its turn comes (see deadlines.turn_s)."""

    name = "edf"
    by = "deadline"

    def key(self, view: EngineView, slots: I4, left: I4, due_s: F8) -> F8:
        return turn_s(view.columns.arrival_s[slots], due_s)


class SRPT(Ordered):
    """Shortest remaining prompt first; relegates unless relegate=0."""

    name = "srpt"
    by = "shortest"

    def __init__(self, budget: float | None = None, relegate: float = 1) -> None:
        super().__init__(budget, relegate)

    def key(self, view: EngineView, slots: I4, left: I4, due_s: F8) -> F8:
        return left.astype(np.float64)


def too_late(step: Step, left: I4, context: I4, slack_s: F8) -> Bools:
    """Whose first token cannot come within slack_s, were the whole rest of the prompt computed in this step."""
    f = step.features
    q = left.astype(np.float64)
    took_s = step.view.model.mean_s(
        f.tokens + q,
        np.full(len(q), f.sequences + 1.0),
        np.ones(len(q)),
        f.prefill_attention + q * (context + 0.5 * q),
        np.full(len(q), float(f.decode_kv_tokens)),
    )
    late: Bools = took_s > slack_s
    return late
