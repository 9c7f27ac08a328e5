"""What the parts of LENS hand to each other while one step is planned."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from nexusengine.arrays import F8, I4, I8, Bools
from nexusengine.scheduler.lens.deadlines import Deadlines
from nexusengine.scheduler.lens.prefill_rate import MarginalCosts, PrefillRate
from nexusengine.scheduler.lens.step_limit import StepLimit
from nexusengine.scheduler.view import EngineView


@dataclass(frozen=True, slots=True)
class PlanContext:
    """What is known before prompts are chosen.

    Attributes:
        view, now: as the policy was asked.
        deadlines: of every slot.
        costs: at the margin of this step.
        limit: how long the step may take for the sake of running requests.
        rate: how fast prompts can be served under that limit.
        calm: nobody is relegated, and little work arrives for the time there is.
    """

    view: EngineView
    now: float
    deadlines: Deadlines
    costs: MarginalCosts
    limit: StepLimit
    rate: PrefillRate
    calm: bool = False


@dataclass(frozen=True, slots=True)
class Prompts:
    """Prompts to compute, in the order to serve them.

    Attributes:
        slots: `[N]`.
        context: `[N]`, tokens in the KV cache when it computes next.
        left: `[N]`, tokens to compute.
        work_s: `[N]`, predicted seconds that the whole rest adds to a step.
        due_s: `[N]`, timestamp by which it must be done; infinite without an SLO.
    """

    slots: I4
    context: I4
    left: I4
    work_s: F8
    due_s: F8

    def __len__(self) -> int:
        return len(self.slots)

    def __getitem__(self, chosen: I8 | Bools | slice) -> Prompts:
        return Prompts(
            self.slots[chosen], self.context[chosen], self.left[chosen], self.work_s[chosen], self.due_s[chosen]
        )

    def __add__(self, later: Prompts) -> Prompts:
        """These, then `later`."""
        return Prompts(
            np.concatenate([self.slots, later.slots]),
            np.concatenate([self.context, later.context]),
            np.concatenate([self.left, later.left]),
            np.concatenate([self.work_s, later.work_s]),
            np.concatenate([self.due_s, later.due_s]),
        )


@dataclass(frozen=True, slots=True)
class Selection:
    """Who is served, and who waits for others.

    Attributes:
        on_time: to be served in this order, all by their deadlines.
        deferred: could be on time by themselves, but would make more of the others late.
        infeasible: slots whose first token cannot come in time any more; they are relegated by this plan.
        relegated: slots that are behind all others, the infeasible among them.
        done_s: `[len(on_time)]`, cumulated work of those on time, seconds.
    """

    on_time: Prompts
    deferred: Prompts
    infeasible: I4
    relegated: I4
    done_s: F8

    @property
    def has_others(self) -> bool:
        """Whether anybody wants to compute beside those who will be on time."""
        return len(self.relegated) + len(self.deferred) > 0
