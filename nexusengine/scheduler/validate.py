"""Whether a policy kept its contract: a cheap check of every plan before anything is done with it."""

from __future__ import annotations

import math

import numpy as np

from nexusengine.scheduler.plan import StepPlan
from nexusengine.scheduler.view import EngineView

_ABSENT, _WAITING, _RUNNING = 0, 1, 2


def plan_problem(plan: StepPlan, view: EngineView) -> str | None:
    """What is wrong with `plan` as an answer to `view`, or None."""
    c = view.columns
    known_slots = len(c.known_tokens)
    status = np.full(known_slots, _ABSENT, np.int8)
    status[view.waiting] = _WAITING
    status[view.running] = _RUNNING
    moved = np.array([*plan.preempt, *plan.refuse], np.intp)
    named = np.concatenate([plan.slots, moved, np.array([*plan.relegate, *plan.restore], np.intp)]).astype(np.intp)
    if len(plan.slots) != len(plan.counts):
        return f"{len(plan.slots)} slots have {len(plan.counts)} counts"
    if len(plan.reasons) != known_slots:
        return f"it has reasons for {len(plan.reasons)} slots of {known_slots}"
    if len(named) and (named.min() < 0 or named.max() >= known_slots or not status[named].all()):
        return "it names a slot without a request"
    if len(named) and np.bincount(np.concatenate([plan.slots, moved])).max(initial=0) > 1:
        return "a slot is twice among the rows, the preempted and the refused"
    if (status[list(plan.preempt)] != _RUNNING).any():
        return "it preempts what does not run"
    if (plan.counts < 1).any() or (plan.counts > (c.known_tokens - c.computed_tokens)[plan.slots]).any():
        return "a row computes no token, or more tokens than are known"
    tokens = int(plan.counts.sum())
    if tokens > view.max_batch_tokens:
        return f"it computes {tokens} tokens, over the limit of {view.max_batch_tokens}"
    running = len(view.running) - len(plan.preempt) + int((status[plan.slots] == _WAITING).sum())
    if running > view.max_running:
        return f"it runs {running} sequences, over the limit of {view.max_running}"
    if not (0.0 <= plan.predicted_s < math.inf and 0.0 <= plan.upper_s < math.inf):
        return f"it predicts a step of {plan.predicted_s} s, at most {plan.upper_s} s"
    return None
