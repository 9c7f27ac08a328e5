"""The published queue-length rule of NexusSched's engine layer (arXiv 2509.23384), from its description: a baseline.

The target of a step's duration grows with the queue from 15 ms to the promised time per token; the batch is searched
upward until its predicted duration reaches the target; prompts are taken shortest first, in chunks of 512.
"""

from __future__ import annotations

import numpy as np

from nexusengine.errors import ConfigError
from nexusengine.scheduler.baselines.fcfs import make_room_for_the_oldest
from nexusengine.scheduler.lens.deadlines import FALLBACK
from nexusengine.scheduler.plan import Reason, StepPlan
from nexusengine.scheduler.step import Step
from nexusengine.scheduler.view import EngineView
from nexusengine.wire import PolicyTraits


class PaperLens:
    """floor_ms: shortest target. per: queue length at which the target has reached the promise. chunk: tokens."""

    name = "paper-lens"

    def __init__(self, floor_ms: float = 15, per: float = 5, chunk: float = 512) -> None:
        if floor_ms <= 0 or per <= 0 or chunk < 1:
            raise ConfigError(f"{self.name}: floor_ms, per and chunk must be positive", param="scheduler")
        self.floor_s, self.per, self.chunk = floor_ms / 1000, per, int(chunk)
        longest_s = max(self.floor_s, FALLBACK.tpot_s)
        self.traits = PolicyTraits("shortest", relegates=False, step_s=longest_s, by_tpot=True)

    def plan(self, view: EngineView, now: float) -> StepPlan:
        c = view.columns
        step = Step(view)
        step.take_decodes(view.running[::-1].tolist())
        present = np.concatenate([view.running, view.waiting])
        tpot_s = min(float(np.fmin.reduce(c.tpot_s[present], initial=np.inf)), FALLBACK.tpot_s)
        grown_s = self.floor_s + (tpot_s - self.floor_s) / self.per * len(view.waiting)
        target_s = max(min(grown_s, tpot_s), self.floor_s)
        self._fill(step, view, target_s)
        if step.empty and step.prompts:
            make_room_for_the_oldest(step)
        return step.plan(notes={"limit_ms": 1000 * target_s})

    def _fill(self, step: Step, view: EngineView, target_s: float) -> None:
        partial = set(step.prompts)
        pending, context, left = step.pending()
        order = np.argsort(left, kind="stable")
        for slot, tokens, done in zip(*(a[order].tolist() for a in (pending, left, context)), strict=True):
            count = min(tokens, self.chunk)
            if not step.empty and view.model.predict(step.features.with_prefill(count, done)).mean_s > target_s:
                step.reasons[pending[order]] = np.where(
                    step.reasons[pending[order]] == Reason.NONE, Reason.WAIT_TIME, step.reasons[pending[order]]
                )
                return
            if slot in partial:
                step.extend(slot, count)
                continue
            reason = Reason.WAIT_BLOCKS if step.preempted else step.admissible(slot)
            if reason is Reason.NONE:
                step.admit(slot, count)
            else:
                step.reasons[slot] = reason
