"""Requests that are relegated: what is left over, a share when they have grown old, and an end of waiting. The share is
also for those without an SLO, which others with one may overtake for ever, but nothing else here."""

from __future__ import annotations

import numpy as np

from nexusengine.arrays import F8, I4, Bools
from nexusengine.scheduler.lens.deadlines import Deadlines
from nexusengine.scheduler.lens.fill import Fill
from nexusengine.scheduler.lens.prefill_rate import Costs, Pace
from nexusengine.scheduler.plan import Reason
from nexusengine.scheduler.step import Step
from nexusengine.scheduler.view import EngineView

_INF = float("inf")
_NONE, _AGED, _LEFTOVER = Reason.NONE, Reason.AGED, Reason.LEFTOVER
_RELEGATED = int(Reason.RELEGATED)
_BUSY = [
    int(r) for r in (Reason.DECODE, Reason.PREFILL, Reason.ADMITTED, Reason.AGED, Reason.LEFTOVER, Reason.PREEMPTED)
]
_WRONGED = 1.2
_LOOK_EVERY_S = 0.1
_GIVE_UP_TTFTS, _GIVE_UP_AT = 3.0, 0.95
_FULL_QUEUE = 0.9
_SPARE = 0.1
_LOOKAHEAD = 64
_CHUNK = 128  # tokens, the smallest piece that is computed out of the share


class Behind:
    """share: of the time for prompts, that goes to the oldest of those who are `patience_s` past their turn (see
    deadlines.turn_s).
    give_up_s: one that computes nothing in a step is refused a little before it is older than 3 TTFTs and this, or when
    the queue is nearly full, unless it streams already; 0: never.

    taken_back_s `[S]`: when a slot's KV was last taken back in favour of others.
    """

    def __init__(self, share: float, patience_s: float, give_up_s: float) -> None:
        self._share, self._patience_s, self._give_up_s = share, patience_s, give_up_s
        self._owed_s = 0.0
        self._last_s = self._looked_s = -_INF
        self.taken_back_s: F8 = np.zeros(0)

    def reset(self, slots: int) -> None:
        self.taken_back_s = np.full(slots, -_INF)

    def share(
        self,
        fill: Fill,
        view: EngineView,
        deadlines: Deadlines,
        slots: I4,
        costs: Costs,
        pace: Pace,
        newcomers: bool,
        seat_s: float,
        now: float,
    ) -> bool:
        """The oldest of `slots` computes from what its kind is owed; a seat, where they are short, costs it the time
        until the next one comes free (seat_s). True if newcomers may start: not if the oldest cannot although much is
        owed, because they would take the place that it waits for."""
        passed_s, self._last_s = min(now - self._last_s, 1.0), now
        aged = deadlines.turn_s[slots] < now - self._patience_s
        if not self._share or not np.count_nonzero(aged):
            self._owed_s = 0.0
            return newcomers
        most_s = max(pace.first_prompts_s, _CHUNK * costs.token_s)
        c, step = view.columns, fill.step
        old = slots[aged]
        slot = int(old[c.arrival_s[old].argmin()])
        context, left = _rest(view, slot)
        per_token_s = costs.token_s + costs.pair_s * context
        price_s = 0.0
        if slot not in step.prompts and step.seats <= int(_SPARE * view.max_running):
            price_s = seat_s / pace.dilution
            most_s = max(most_s, price_s + _CHUNK * costs.token_s)
        self._owed_s = min(self._owed_s + self._share * passed_s / pace.dilution, most_s)
        affordable_s = self._owed_s - price_s
        count = left if left * per_token_s <= affordable_s else int(affordable_s / per_token_s)
        if count < min(left, _CHUNK):
            return newcomers
        before = step.taken
        if slot in step.prompts:
            fill.go_on(slot, context, left, count)
        elif newcomers:
            reason = fill.start(slot, context, left, _INF, count)
            if reason is not _NONE:
                step.reasons[slot] = reason
                return reason is Reason.WAIT_TIME or self._owed_s < most_s
        if step.taken > before:
            step.reasons[slot] = _AGED
            self._owed_s = max(self._owed_s - (step.taken - before) * per_token_s - price_s, 0.0)
        return newcomers

    def leftover(self, fill: Fill, view: EngineView, behind: I4, newcomers: bool) -> None:
        """What the others left of the step, the oldest first. Newcomers only while seats and KV stay free for those who
        arrive next."""
        c, step = view.columns, fill.step
        spare_seats, spare_blocks = int(_SPARE * view.max_running), int(_SPARE * view.total_blocks)
        begun = set(step.prompts)
        newcomers = newcomers and step.seats > spare_seats and step.free_blocks > spare_blocks
        if not newcomers:
            behind = behind[c.blocks[behind] > 0]
        for slot in behind[c.arrival_s[behind].argsort(kind="stable")[:_LOOKAHEAD]].tolist():
            if not fill.open:
                return
            if step.reasons[slot] != _RELEGATED:
                continue
            if slot in begun:
                if fill.go_on(slot, *_rest(view, slot)):
                    step.reasons[slot] = _LEFTOVER
            elif step.seats > spare_seats and step.free_blocks > spare_blocks:
                reason = fill.start(slot, *_rest(view, slot), _INF)
                step.reasons[slot] = _LEFTOVER if reason is _NONE else reason

    def review(
        self, step: Step, view: EngineView, deadlines: Deadlines, behind: I4, costs: Costs, pace: Pace, now: float
    ) -> tuple[list[int], list[int]]:
        """Slots whose promise can be kept after all, and slots to refuse. Looks only every tenth of a second."""
        if now - self._looked_s < _LOOK_EVERY_S:
            return [], []
        self._looked_s = now
        behind = behind[view.columns.relegated[behind]]
        return self._wronged(view, deadlines, behind, costs, pace, now), self._give_up(
            step, view, deadlines, behind, now
        )

    def _wronged(
        self, view: EngineView, deadlines: Deadlines, behind: I4, costs: Costs, pace: Pace, now: float
    ) -> list[int]:
        """The prediction that relegated them was wrong: they could be in time, with something to spare."""
        c = view.columns
        slack_s = deadlines.prefill_due_s[behind] - (now + pace.decode_s + pace.extra_s)
        hopeful = slack_s > 0.0
        if not hopeful.any():
            return []
        slots = behind[hopeful]
        context = np.where(c.blocks[slots] > 0, c.computed_tokens[slots], c.cached_tokens[slots])
        work_s = costs.work_s(context, c.known_tokens[slots] - context)
        back: list[int] = slots[_WRONGED * work_s < slack_s[hopeful]].tolist()
        return back

    def _give_up(self, step: Step, view: EngineView, deadlines: Deadlines, behind: I4, now: float) -> list[int]:
        c = view.columns
        if not self._give_up_s:
            return []
        arrival_s = c.arrival_s[behind]
        age_s = now - arrival_s
        bound_s = _GIVE_UP_TTFTS * (deadlines.first_due_s[behind] - arrival_s) + self._give_up_s
        out: Bools = age_s > _GIVE_UP_AT * bound_s
        too_many = len(view.waiting) - int(_FULL_QUEUE * (len(c.known_tokens) - view.max_running))
        if too_many > 0:
            out[np.argsort(age_s, kind="stable")[:too_many]] = True
        if not out.any():
            return []
        slots = behind[out]
        busy = np.isin(step.reasons[slots], _BUSY) | (c.generated_tokens[slots] > 0)
        refused: list[int] = slots[~busy].tolist()
        step.reasons[refused] = Reason.REFUSED
        return refused


def _rest(view: EngineView, slot: int) -> tuple[int, int]:
    """Tokens in the KV cache when a slot computes next, and tokens left."""
    c = view.columns
    context = int(c.computed_tokens[slot] if c.blocks[slot] else c.cached_tokens[slot])
    return context, int(c.known_tokens[slot]) - context
