"""Whose KV is taken back when blocks run out."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np

from nexusengine.arrays import F8
from nexusengine.scheduler.lens.deadlines import Deadlines
from nexusengine.scheduler.plan import Reason
from nexusengine.scheduler.step import Step
from nexusengine.scheduler.view import EngineView

_PAUSE_S = 10.0


def victims(view: EngineView, deadlines: Deadlines, now: float) -> Iterator[int]:
    """Running slots in the order in which they give way to decodes that lack a block.

    Those whose SLO is missed first, then the loosest tpot, prompts before those that generate, the newest. Lazy: sorts
    only if it is asked.
    """
    c, running = view.columns, view.running
    first_s = np.fmin(c.first_token_s[running], now)  # now, before there is a first token
    lost = c.relegated[running] | (first_s > deadlines.first_due_s[running])
    order = np.lexsort((-c.arrival_s[running], c.generated_tokens[running] > 0, -deadlines.tpot_s[running], ~lost))
    yield from running[order].tolist()


def to_preempt_for(step: Step, view: EngineView, preempted_s: F8, now: float) -> int | None:
    """The relegated prompt that gives its KV back to one whose SLO can be met.

    The newest partially prefilled one that computes nothing in this step, and was not preempted within 10 s.
    """
    c = view.columns
    partial = np.array(step.prompts, np.int32)
    free = (step.reasons[partial] == Reason.RELEGATED) & (c.generated_tokens[partial] == 0)
    candidates = partial[free & (preempted_s[partial] < now - _PAUSE_S)]
    return int(candidates[c.arrival_s[candidates].argmax()]) if len(candidates) else None
