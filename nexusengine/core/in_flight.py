"""A step between its submission and the application of its result."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from nexusengine.arrays import I8
from nexusengine.core.history import REASON_NAMES
from nexusengine.core.request import RequestState
from nexusengine.execute.batch import StepBatch
from nexusengine.perf.features import StepFeatures
from nexusengine.scheduler.plan import Reason, StepPlan
from nexusengine.scheduler.scheduler import Scheduler
from nexusengine.wire import StepRecord


@dataclass(frozen=True, slots=True)
class InFlightStep:
    """What the core must remember of a submitted step.

    Attributes:
        number: from 1.
        states: the request of each row; its slot may belong to another by the time the result is there.
        releases: `[R]`, KVManager.releases of their slots, which tell who still holds the blocks that the step writes.
        started_s: timestamp on the core's clock.
        planning_s: seconds spent planning it and building its batch.
        preempted: requests that lost their blocks to the plan.
        cold: the device had been idle for long.
    """

    number: int
    plan: StepPlan
    batch: StepBatch
    features: StepFeatures
    states: tuple[RequestState, ...]
    releases: I8
    started_s: float
    planning_s: float
    preempted: int
    cold: bool

    @property
    def expected_end_s(self) -> float:
        """Timestamp at which it ends, by its prediction."""
        return self.started_s + self.plan.predicted_s

    def record(self, scheduler: Scheduler[RequestState], device_s: float, scheduler_s: float) -> StepRecord:
        """The step as it went, its result applied."""
        f = self.features
        reasons = zip(REASON_NAMES[1:], np.bincount(self.plan.reasons, minlength=len(Reason))[1:].tolist(), strict=True)
        return StepRecord(
            step=self.number,
            started_s=self.started_s,
            tokens=f.tokens,
            sequences=f.sequences,
            prefills=f.prefills,
            prefill_attention=f.prefill_attention,
            decode_kv_tokens=f.decode_kv_tokens,
            predicted_s=self.plan.predicted_s,
            upper_s=self.plan.upper_s,
            device_s=device_s,
            scheduler_s=scheduler_s,
            running=len(scheduler.running) + len(scheduler.ending),
            waiting=len(scheduler.waiting),
            preempted=self.preempted,
            reasons={name: count for name, count in reasons if count},
            notes=self.plan.notes,
        )
