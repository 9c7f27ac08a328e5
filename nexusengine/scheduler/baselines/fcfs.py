"""First come, first served, with chunked prefill: the plainest policy, and the baseline of all others.

Every decode runs; what is left of the token budget goes to prompts in order of admission, then of arrival. Knows no
SLO and does not use the performance model but to report its prediction.
"""

from __future__ import annotations

from typing import Literal

from nexusengine.arrays import I4
from nexusengine.errors import ConfigError
from nexusengine.scheduler.plan import Reason, StepPlan
from nexusengine.scheduler.step import Step
from nexusengine.scheduler.view import EngineView
from nexusengine.wire import PolicyTraits


class FCFS:
    """budget: most tokens a step, prompts and decodes together; default: the engine's max_batch_tokens."""

    name = "fcfs"

    def __init__(self, budget: float | None = None) -> None:
        if budget is not None and (budget < 1 or budget != int(budget)):
            raise ConfigError(
                f"{self.name}: budget must be a whole number of tokens >= 1, got {budget}", param="scheduler"
            )
        self.budget = None if budget is None else int(budget)
        self.traits = by_tokens("arrival", self.budget)

    def plan(self, view: EngineView, now: float) -> StepPlan:
        step = Step(view, self.budget)
        step.take_decodes(view.running[::-1].tolist())
        for slot in step.prompts:
            step.extend(slot)
        if step.preempted:
            step.reasons[view.waiting] = Reason.WAIT_BLOCKS
        else:
            admit_in_order(step, self.order(view, now))
        if step.empty and step.prompts:
            make_room_for_the_oldest(step)
        return step.plan()

    def order(self, view: EngineView, now: float) -> I4:
        """The order in which waiting slots are admitted."""
        return view.waiting


def by_tokens(
    order: Literal["deadline", "arrival", "shortest"], budget: int | None, *, relegates: bool = False
) -> PolicyTraits:
    """Of a policy whose steps are limited by their tokens alone."""
    return PolicyTraits(order, relegates, budget or 0, by_tpot=False)


def admit_in_order(step: Step, order: I4) -> None:
    """Newcomers one after the other; the first that cannot start holds back those behind it."""
    for n, slot in enumerate(order.tolist()):
        reason = step.admissible(slot)
        if reason is not Reason.NONE:
            step.reasons[order[n:]] = reason
            return
        step.admit(slot)


def make_room_for_the_oldest(step: Step) -> None:
    """Nothing could run: KV is full of partially prefilled prompts. The newest give way until one can go on."""
    while step.empty and len(step.prompts) > 1:
        step.preempt(step.prompts[-1])
        step.extend(step.prompts[0])
