"""Prompts before decodes, in steps of their own: the schedule of vLLM's first engine (v0), a baseline of LENS."""

from __future__ import annotations

from nexusengine.scheduler.baselines.fcfs import FCFS, make_room_for_the_oldest
from nexusengine.scheduler.plan import Reason, StepPlan
from nexusengine.scheduler.step import Step
from nexusengine.scheduler.view import EngineView


class PrefillFirst(FCFS):
    """Prompts before decodes.

    While a prompt can start, a step computes whole prompts in order of arrival, up to the budget; a prompt longer than
    the budget is cut and goes on in the next step. Otherwise a step computes all decodes.
    """

    name = "prefill-first"

    def plan(self, view: EngineView, now: float) -> StepPlan:
        step = Step(view, self.budget)
        for slot in step.prompts:
            step.extend(slot)
        self._admit_whole(step, view)
        if step.empty:
            step.take_decodes(view.running[::-1].tolist())
        else:
            step.reasons[step.decodes] = Reason.WAIT_ORDER
        if step.empty and step.prompts:
            make_room_for_the_oldest(step)
        return step.plan()

    def _admit_whole(self, step: Step, view: EngineView) -> None:
        c = view.columns
        for n, slot in enumerate(view.waiting.tolist()):
            reason = step.admissible(slot)
            if reason is Reason.NONE and not step.empty and step.tokens < c.known_tokens[slot] - c.cached_tokens[slot]:
                reason = Reason.WAIT_TOKENS
            if reason is not Reason.NONE:
                step.reasons[view.waiting[n:]] = reason
                return
            step.admit(slot)
