"""Who is served so that as many first tokens as possible come in time."""

from __future__ import annotations

import numpy as np

from nexusengine.arrays import F8, I4
from nexusengine.scheduler.lens.context import PlanContext, Prompts, Selection
from nexusengine.scheduler.lens.estimators import SlotReleaseRate
from nexusengine.scheduler.lens.length_guard import LengthGuard
from nexusengine.scheduler.moore_hodgson import defer
from nexusengine.scheduler.view import EngineView

_INF = float("inf")
RESPONSE_MARGIN_S = 0.003
"""For the way back to the client."""
_SLOT_SHARE = 0.5  # of the running slots expected to come free in time that waiting requests count on


def select(
    context: PlanContext,
    prompts: Prompts,
    relegated: I4,
    *,
    free_running_slots: int,
    slot_releases: SlotReleaseRate,
    guard: LengthGuard | None,
    defer_some: bool,
) -> Selection:
    """Those without an SLO are served after all others, and neither deferred nor infeasible.

    Args:
        prompts: in the order to serve them.
        relegated: slots that are relegated already.
        slot_releases: how fast further running slots come free.
        guard: protects some of the long prompts from being deferred.
        defer_some: whether anything can be served; otherwise nobody is deferred.
    """
    have_slo = prompts.due_s < _INF
    without: Prompts | None = None
    if np.count_nonzero(have_slo) < len(prompts):
        prompts, without = prompts[have_slo], prompts[~have_slo]
    deferred, infeasible = prompts[:0], relegated[:0]
    if len(prompts):
        slack_s = prompts.due_s - (context.now + RESPONSE_MARGIN_S)
        late = prompts.work_s > slack_s - (context.rate.decode_s + context.rate.extra_s)
        if np.count_nonzero(late):
            infeasible = prompts.slots[late]
            prompts, slack_s = prompts[~late], slack_s[~late]
            relegated = np.concatenate([relegated, infeasible])
        if defer_some:
            prompts, deferred = _deferred(context, prompts, slack_s, free_running_slots, slot_releases, guard)
    if without is not None:
        prompts = prompts + without
    return Selection(prompts, deferred, infeasible, relegated, prompts.work_s.cumsum())


def _deferred(
    context: PlanContext,
    prompts: Prompts,
    slack_s: F8,
    free_running_slots: int,
    slot_releases: SlotReleaseRate,
    guard: LengthGuard | None,
) -> tuple[Prompts, Prompts]:
    """Those who are served by their deadlines, and those left out for their sake."""
    view, rate = context.view, context.rate
    c = view.columns
    allowed_s = rate.work_until(slack_s)
    needs_slot, slots, short = c.blocks[prompts.slots] == 0, None, False
    if np.count_nonzero(needs_slot) > free_running_slots:
        start_s = slack_s - rate.step_s - rate.eager_slowdown * prompts.work_s
        slots = slot_releases.slots_within(_SLOT_SHARE * start_s, free_running_slots, view.max_running)
        short = bool((needs_slot.cumsum() > slots).any())
    if not short and not np.count_nonzero(prompts.work_s.cumsum() > allowed_s):
        return prompts, prompts[:0]
    if context.limit.slot >= 0:  # decodes make the best of the steps they allow
        allowed_s = rate.work_in_whole_steps(slack_s)
    rank = 2 * c.priority[prompts.slots]
    if view.over_share is not None:
        rank = 2 * rank - 2 * view.over_share[prompts.slots]
    if guard is not None and guard.active:
        rank = rank + guard.protected(c.prompt_tokens[prompts.slots])
    out = defer(prompts.work_s, allowed_s, rank.tolist(), needs_slot, slots if short else None)
    return prompts[~out], prompts[out]


def can_wait(context: PlanContext, selection: Selection) -> bool:
    """Whether prompts can wait for a decode-only step.

    There is more to do than fits now, and none of those that would be done in this step would be late.
    """
    done_s, rate = selection.done_s, context.rate
    if not len(done_s) or (done_s[-1] < rate.prompts_s and not selection.has_others):
        return selection.has_others
    later_s = context.now + rate.step_s + rate.gain_s + rate.decode_s + RESPONSE_MARGIN_S
    first = selection.on_time.due_s[: int(done_s.searchsorted(rate.prompts_s, side="right"))]
    return not (first < later_s).any()


def precedence(view: EngineView, slots: I4, due_s: F8) -> I4:
    """Who of `slots [N]` goes first within a class, highest first: by priority, without an SLO then by share.

    Of those with an SLO, the share decides who is deferred and who may start, not the order of those in time.
    """
    priority = view.columns.priority[slots]
    return priority if view.over_share is None else 2 * priority - (view.over_share[slots] & np.isinf(due_s))


def in_order(due_s: F8, tpot_s: F8, priority: I4) -> I4:
    """Indices `[N]` by deadline; within a class (equal tpot_s) its places are given out by priority, highest first."""
    order = due_s.argsort(kind="stable").astype(np.int32)
    return by_priority(order, tpot_s, priority) if np.count_nonzero(priority) else order


def by_priority(order: I4, tpot_s: F8, priority: I4) -> I4:
    """Give out the places of each class (equal tpot_s) anew by priority, highest first.

    Args:
        order: `[N]`, indices into the other two.
        tpot_s, priority: `[N]`.

    Returns:
        The new order, `[N]`.
    """
    result = order.copy()
    classes = tpot_s[order]
    for value in np.unique(classes):
        places = np.nonzero(classes == value)[0]
        members = order[places]
        result[places] = members[np.argsort(-priority[members].astype(np.int64), kind="stable")]
    return result
