"""Requests that are relegated: what is left over, a share when they have grown old, and an end of waiting."""

from __future__ import annotations

import numpy as np

from nexusengine.lens.deadlines import Deadlines
from nexusengine.lens.fill import Fill
from nexusengine.lens.pace import Outlook, Pace, look_ahead
from nexusengine.lens.plan import Reason
from nexusengine.lens.step import Step
from nexusengine.lens.view import F8, I4, EngineView

_INF = float("inf")
_WRONGED = 1.2
_GIVE_UP_TTFTS = 3.0
_FULL_QUEUE = 0.9
_SPARE = 0.1
_LOOKAHEAD = 64


class Behind:
    """share: of the time for prompts, that goes to the oldest of those who are `patience_s` past their deadline.
    give_up_s: one that has not begun is refused when it is 3 TTFTs and this old, or when the queue is nearly full.

    taken_back_s `[S]`: when a slot's KV was last taken back in favour of others.
    """

    def __init__(self, share: float, patience_s: float, give_up_s: float) -> None:
        self._share, self._patience_s, self._give_up_s = share, patience_s, give_up_s
        self._owed_s = 0.0
        self._last_s = _INF
        self.taken_back_s: F8 = np.zeros(0)

    def reset(self, slots: int) -> None:
        self.taken_back_s = np.full(slots, -_INF)

    def share(
        self,
        fill: Fill,
        view: EngineView,
        deadlines: Deadlines,
        behind: I4,
        pace: Pace,
        outlook: Outlook,
        newcomers: bool,
        now: float,
    ) -> bool:
        """The oldest computes from what its kind is owed. True if newcomers may start: not if the oldest cannot
        although much is owed, because they would take the place that it waits for."""
        aged = behind[deadlines.first_due_s[behind] + self._patience_s < now]
        passed_s, self._last_s = max(now - self._last_s, 0.0), now
        if not len(aged) or not self._share:
            self._owed_s = 0.0
            return newcomers
        self._owed_s = min(self._owed_s + self._share * passed_s / pace.dilution, pace.prompts_s)
        c, step = view.columns, fill.step
        slot = int(aged[c.arrival_s[aged].argmin()])
        limit_s = outlook.decode_s + outlook.extra_s + self._owed_s
        before = step.features
        if slot in step.prompts:
            context = int(c.computed_tokens[slot])
            got = fill.go_on(slot, context, int(c.known_tokens[slot]) - context, limit_s) > 0
        elif newcomers:
            context = int(c.cached_tokens[slot])
            reason = fill.start(slot, context, int(c.known_tokens[slot]) - context, _INF, limit_s)
            got = reason is Reason.NONE
            if not got and reason is not Reason.WAIT_TIME:
                step.reasons[slot] = reason
                return self._owed_s < pace.prompts_s
        else:
            return newcomers
        if got:
            step.reasons[slot] = Reason.AGED
            model = view.model
            cost_s = model.predict(step.features).mean_s - model.predict(before).mean_s - outlook.extra_s
            self._owed_s = max(self._owed_s - max(cost_s, 0.0), 0.0)
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
            if step.reasons[slot] != Reason.RELEGATED:
                continue
            if slot in begun:
                context = int(c.computed_tokens[slot])
                if fill.go_on(slot, context, int(c.known_tokens[slot]) - context):
                    step.reasons[slot] = Reason.LEFTOVER
            elif step.seats > spare_seats and step.free_blocks > spare_blocks:
                context = int(c.cached_tokens[slot])
                reason = fill.start(slot, context, int(c.known_tokens[slot]) - context, _INF)
                step.reasons[slot] = Reason.LEFTOVER if reason is Reason.NONE else reason

    def give_up(self, step: Step, view: EngineView, deadlines: Deadlines, behind: I4, now: float) -> tuple[int, ...]:
        """Slots to refuse."""
        c = view.columns
        if not self._give_up_s:
            return ()
        arrival_s = c.arrival_s[behind]
        bound_s = arrival_s + _GIVE_UP_TTFTS * (deadlines.first_due_s[behind] - arrival_s) + self._give_up_s
        hopeless = behind[now > bound_s]
        places = len(c.known_tokens) - view.max_running
        too_many = len(view.waiting) - int(_FULL_QUEUE * places)
        if too_many > len(hopeless):
            hopeless = behind[np.argsort(-arrival_s, kind="stable")[:too_many]]
        if not len(hopeless):
            return ()
        waiting = hopeless[(c.blocks[hopeless] == 0) & (c.generated_tokens[hopeless] == 0)]
        refused = [
            s for s in waiting.tolist() if step.reasons[s] not in (Reason.AGED, Reason.LEFTOVER, Reason.PREEMPTED)
        ]
        step.reasons[refused] = Reason.REFUSED
        return tuple(refused)

    def wronged(
        self, step: Step, view: EngineView, deadlines: Deadlines, behind: I4, outlook: Outlook, now: float
    ) -> list[int]:
        """Slots that could get their first token in time after all, with something to spare."""
        c = view.columns
        slack_s = deadlines.prefill_due_s[behind] - (now + outlook.decode_s + outlook.extra_s)
        hopeful = behind[slack_s > 0.0]
        hopeful = hopeful[c.relegated[hopeful]]
        if not len(hopeful):
            return []
        context = np.where(c.blocks[hopeful] > 0, c.computed_tokens[hopeful], c.cached_tokens[hopeful])
        work_s = look_ahead(view.model, step.features, 0, 0, context, c.known_tokens[hopeful] - context).work_s
        slack_s = slack_s[slack_s > 0.0][c.relegated[behind[slack_s > 0.0]]]
        back: list[int] = hopeful[_WRONGED * work_s < slack_s].tolist()
        return back
