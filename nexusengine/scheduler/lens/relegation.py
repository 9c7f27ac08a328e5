"""Relegated requests: what is left over, a share when they have grown old, and an end of waiting.

The share is also for those without an SLO, which others with one may overtake for ever, but nothing else here.
"""

from __future__ import annotations

import numpy as np

from nexusengine.arrays import F8, I4, Bools
from nexusengine.scheduler.lens.context import PlanContext, Prompts
from nexusengine.scheduler.lens.fill import SPARE, Fill
from nexusengine.scheduler.lens.step_limit import StepLimit
from nexusengine.scheduler.plan import Reason
from nexusengine.scheduler.step import Step
from nexusengine.scheduler.view import EngineView

_INF = float("inf")
_NONE, _AGED, _BACKFILL = Reason.NONE, Reason.AGED, Reason.BACKFILL  # members of an enum are slow to look up
_RELEGATED = int(Reason.RELEGATED)
_BUSY = [
    int(r) for r in (Reason.DECODE, Reason.PREFILL, Reason.ADMITTED, Reason.AGED, Reason.BACKFILL, Reason.PREEMPTED)
]
_FOR_SLOT, _FOR_BLOCKS, _FOR_TPOT = int(Reason.WAIT_RUNNING_SLOT), int(Reason.WAIT_BLOCKS), int(Reason.WAIT_TPOT)
_PATIENCE_S = 20.0  # past its turn (see deadlines.turn_s) after which a request gets from the share
_RESTORABLE = 1.2  # times its work must fit into its slack: restored at the first hope, it would be relegated again
_LOOK_EVERY_S = 0.1
_SHED_TTFTS, _SHED_AT = 3.0, 0.95
_FULL_QUEUE = 0.9
_LOOKAHEAD = 64
_MIN_AGED_CHUNK_TOKENS = 128


class RelegationQueue:
    """What relegated requests get.

    Args:
        share, shed_s: see LensOptions.

    Attributes:
        preempted_s: `[S]`, timestamp at which a slot's KV was last taken back in favour of others.
    """

    def __init__(self, share: float, shed_s: float) -> None:
        self._share, self._shed_s = share, shed_s
        self._credit_s = 0.0
        self._last_s = self._looked_s = -_INF
        self.preempted_s: F8 = np.zeros(0)

    def reset(self, slots: int) -> None:
        self.preempted_s = np.full(slots, -_INF)

    def serve_aged(self, fill: Fill, context: PlanContext, slots: I4, may_start: bool, slot_wait_s: float) -> bool:
        """The oldest of `slots` computes from the credit of its kind.

        Args:
            may_start: whether waiting requests may start in this step.
            slot_wait_s: until the next running slot comes free; where slots are short, one costs this much credit.

        Returns:
            Whether others may start: not if the oldest cannot although its credit is full, because they would take the
            place that it waits for.
        """
        view, costs, rate, now = context.view, context.costs, context.rate, context.now
        passed_s, self._last_s = min(now - self._last_s, 1.0), now
        aged = context.deadlines.turn_s[slots] < now - _PATIENCE_S
        if not self._share or not np.count_nonzero(aged):
            self._credit_s = 0.0
            return may_start
        most_s = max(rate.first_prompts_s, _MIN_AGED_CHUNK_TOKENS * costs.token_s)
        c, step = view.columns, fill.step
        old = slots[aged]
        slot = int(old[c.arrival_s[old].argmin()])
        cached, left = _rest(view, slot)
        per_token_s = costs.token_s + costs.pair_s * cached
        price_s = 0.0
        if slot not in step.prompts and step.free_running_slots <= int(SPARE * view.max_running):
            price_s = slot_wait_s / rate.slowdown
            most_s = max(most_s, price_s + _MIN_AGED_CHUNK_TOKENS * costs.token_s)
        self._credit_s = min(self._credit_s + self._share * passed_s / rate.slowdown, most_s)
        affordable_s = self._credit_s - price_s
        count = left if left * per_token_s <= affordable_s else int(affordable_s / per_token_s)
        if count < min(left, _MIN_AGED_CHUNK_TOKENS):
            return may_start
        before = step.taken
        if slot in step.prompts:
            fill.resume(slot, cached, left, count)
        elif may_start:
            reason = fill.start(slot, cached, left, _INF, count)
            if reason is not _NONE:
                step.reasons[slot] = reason
                return reason is Reason.WAIT_TIME or self._credit_s < most_s
        if step.taken > before:
            step.reasons[slot] = _AGED
            self._credit_s = max(self._credit_s - (step.taken - before) * per_token_s - price_s, 0.0)
        return may_start

    def backfill(self, fill: Fill, view: EngineView, relegated: I4, may_start: bool) -> None:
        """Give relegated requests what the others left of the step, the oldest first.

        They start only while running slots and KV stay free for those who arrive next.
        """
        c, step = view.columns, fill.step
        spare_slots, spare_blocks = int(SPARE * view.max_running), int(SPARE * view.total_blocks)
        partial = set(step.prompts)
        may_start = may_start and step.free_running_slots > spare_slots and step.free_blocks > spare_blocks
        if not may_start:
            relegated = relegated[c.blocks[relegated] > 0]
        for slot in relegated[c.arrival_s[relegated].argsort(kind="stable")[:_LOOKAHEAD]].tolist():
            if not fill.open:
                return
            if step.reasons[slot] != _RELEGATED:
                continue
            if slot in partial:
                if fill.resume(slot, *_rest(view, slot)):
                    step.reasons[slot] = _BACKFILL
            elif step.free_running_slots > spare_slots and step.free_blocks > spare_blocks:
                reason = fill.start(slot, *_rest(view, slot), _INF)
                step.reasons[slot] = _BACKFILL if reason is _NONE else reason

    def review(self, step: Step, context: PlanContext, relegated: I4) -> tuple[list[int], list[int]]:
        """Slots to restore, whose SLO can be met after all, and slots to refuse. Looks only every tenth of a second."""
        if context.now - self._looked_s < _LOOK_EVERY_S:
            return [], []
        self._looked_s = context.now
        relegated = relegated[context.view.columns.relegated[relegated]]
        return self._restorable(context, relegated), self._shed(step, context, relegated)

    def _restorable(self, context: PlanContext, relegated: I4) -> list[int]:
        """The prediction that relegated them was wrong: they could be in time, with something to spare."""
        c, rate = context.view.columns, context.rate
        slack_s = context.deadlines.prefill_due_s[relegated] - (context.now + rate.decode_s + rate.extra_s)
        hopeful = slack_s > 0.0
        if not hopeful.any():
            return []
        slots = relegated[hopeful]
        cached = c.context_tokens(slots)
        work_s = context.costs.work_s(cached, c.known_tokens[slots] - cached)
        restored: list[int] = slots[_RESTORABLE * work_s < slack_s[hopeful]].tolist()
        return restored

    def _shed(self, step: Step, context: PlanContext, relegated: I4) -> list[int]:
        """Whom to refuse: those who waited too long, or have waited least where the queue is nearly full.

        Not those who compute in this step or stream already.
        """
        view = context.view
        c = view.columns
        if not self._shed_s:
            return []
        arrival_s = c.arrival_s[relegated]
        age_s = context.now - arrival_s
        bound_s = _SHED_TTFTS * (context.deadlines.first_due_s[relegated] - arrival_s) + self._shed_s
        shed: Bools = age_s > _SHED_AT * bound_s
        too_many = len(view.waiting) - int(_FULL_QUEUE * (len(c.known_tokens) - view.max_running))
        if too_many > 0:
            rank = age_s if view.over_share is None else np.where(view.over_share[relegated], -1.0, age_s)
            shed[np.argsort(rank, kind="stable")[:too_many]] = True
        if not shed.any():
            return []
        slots = relegated[shed]
        busy = np.isin(step.reasons[slots], _BUSY) | (c.generated_tokens[slots] > 0)
        refused: list[int] = slots[~busy].tolist()
        step.reasons[refused] = Reason.REFUSED
        return refused


def _rest(view: EngineView, slot: int) -> tuple[int, int]:
    """Tokens in the KV cache when a slot computes next, and tokens left."""
    c = view.columns
    cached = int(c.computed_tokens[slot]) or int(c.cached_tokens[slot])
    return cached, int(c.known_tokens[slot]) - cached


def resumed(view: EngineView, step: Step, limit: StepLimit) -> tuple[int, ...]:
    """Slots that were relegated when they had been preempted, and decode in time all the same."""
    c, decodes = view.columns, step.decodes
    again = c.relegated[decodes]
    if not np.count_nonzero(again):
        return ()
    return tuple(decodes[again & ~limit.slo_missed & (c.generated_tokens[decodes] > 0)].tolist())


def waits_for_decodes(step: Step, on_time: Prompts) -> bool:
    """Whether one who is to be on time waits for decodes to end: then the step had better be short."""
    waits = step.reasons[on_time.slots[on_time.due_s < _INF]]
    return bool(((waits == _FOR_SLOT) | (waits == _FOR_BLOCKS) | (waits == _FOR_TPOT)).any())
