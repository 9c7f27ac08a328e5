"""Whether a policy kept its contract: a cheap check of every plan before anything is done with it."""

from __future__ import annotations

import math

import numpy as np

from nexusengine.arrays import I4
from nexusengine.scheduler.plan import StepPlan
from nexusengine.scheduler.view import EngineView

_WAITING, _RUNNING = 1, 2  # 0: there is no request


def plan_problem(plan: StepPlan, view: EngineView) -> str | None:
    """What is wrong with `plan` as an answer to `view`, or None."""
    c, slots, counts = view.columns, plan.slots, plan.counts
    known_slots = len(c.known_tokens)
    if len(slots) != len(counts):
        return f"{len(slots)} slots have {len(counts)} counts"
    if len(plan.reasons) != known_slots:
        return f"it has reasons for {len(plan.reasons)} slots of {known_slots}"
    status = np.zeros(known_slots, np.int8)
    status[view.waiting] = _WAITING
    status[view.running] = _RUNNING
    once = slots if not (plan.preempt or plan.refuse) else _with(slots, *plan.preempt, *plan.refuse)
    named = once if not (plan.relegate or plan.restore) else _with(once, *plan.relegate, *plan.restore)
    if np.count_nonzero((named < 0) | (named >= known_slots)) or np.count_nonzero(status[named]) < len(named):
        return "it names a slot without a request"
    seen = np.zeros(known_slots, np.bool_)
    seen[once] = True
    if np.count_nonzero(seen) < len(once):
        return "a slot is twice among the rows, the preempted and the refused"
    if plan.preempt and (status[list(plan.preempt)] != _RUNNING).any():
        return "it preempts what does not run"
    if np.count_nonzero((counts < 1) | (counts > c.known_tokens[slots] - c.computed_tokens[slots])):
        return "a row computes no token, or more tokens than are known"
    tokens = int(counts.sum())
    if tokens > view.max_batch_tokens:
        return f"it computes {tokens} tokens, over the limit of {view.max_batch_tokens}"
    running = len(view.running) - len(plan.preempt) + int(np.count_nonzero(status[slots] == _WAITING))
    if running > view.max_running:
        return f"it runs {running} sequences, over the limit of {view.max_running}"
    if not (0.0 <= plan.predicted_s < math.inf and 0.0 <= plan.upper_s < math.inf):
        return f"it predicts a step of {plan.predicted_s} s, at most {plan.upper_s} s"
    return None


def _with(slots: I4, *more: int) -> I4:
    return np.concatenate([slots, np.array(more, np.int32)])
