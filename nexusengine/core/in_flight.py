"""A step between its submission and the application of its result."""

from __future__ import annotations

from dataclasses import dataclass

from nexusengine.core.request import RequestState
from nexusengine.execute.batch import StepBatch
from nexusengine.perf.features import StepFeatures
from nexusengine.scheduler.plan import StepPlan


@dataclass(frozen=True, slots=True)
class Flight:
    """What the core must remember of a submitted step.

    states: the request of each row; its slot may belong to another by the time the result is there. lives: how often
    each had been preempted, which tells whether it still holds the blocks that the step wrote. started_s on the core's
    clock. cold: the device had been idle for long. preempted: requests that lost their blocks to the plan.
    """

    number: int
    plan: StepPlan
    batch: StepBatch
    features: StepFeatures
    states: tuple[RequestState, ...]
    lives: tuple[int, ...]
    started_s: float
    planning_s: float
    preempted: int
    cold: bool
