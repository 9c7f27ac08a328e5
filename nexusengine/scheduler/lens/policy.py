"""LENS: each step, the work that keeps the most requests within their SLOs.

Decodes run always; how long the step may take follows from what their mean times per token allow (step_limit.py). Into
that time go prompts by deadline, less those that would make more of the others late than they are worth (select.py);
where mixed steps are dear, prefills are coalesced into fewer, longer ones (prefill_rate.py). Prompts whose first token
cannot come in time any more are relegated: they backfill what the others leave, and get a share of the step when they
have grown old (relegation.py). Those without an SLO come after all deadlines, as they arrived, and get the same share
when others keep overtaking them.
"""

from __future__ import annotations

import numpy as np

from nexusengine.arrays import F8, I4
from nexusengine.perf.features import StepFeatures
from nexusengine.scheduler.lens.context import PlanContext, Prompts, Selection
from nexusengine.scheduler.lens.deadlines import Deadlines
from nexusengine.scheduler.lens.estimators import OutputLengthFloor, SlotReleaseRate
from nexusengine.scheduler.lens.fill import Fill, force
from nexusengine.scheduler.lens.length_guard import LengthGuard
from nexusengine.scheduler.lens.options import LensOptions
from nexusengine.scheduler.lens.preemption import to_preempt_for, victims
from nexusengine.scheduler.lens.prefill_rate import (
    MarginalCosts,
    PrefillRate,
    fixed_rate,
    marginal_costs,
    mixing_cost_s,
    prefill_rate,
)
from nexusengine.scheduler.lens.relegation import RelegationQueue, resumed, waits_for_decodes
from nexusengine.scheduler.lens.select import RESPONSE_MARGIN_S, can_wait, in_order, precedence, select
from nexusengine.scheduler.lens.step_cap import StepCap
from nexusengine.scheduler.lens.step_limit import StepLimit, step_limit
from nexusengine.scheduler.plan import Reason, StepPlan
from nexusengine.scheduler.step import Step
from nexusengine.scheduler.view import EngineView
from nexusengine.wire import PolicyTraits

_INF = float("inf")
_SEEN_TOKENS = 512  # a step of this size is planned before any was seen
_COSTS_EVERY = 16  # plans, after the first ones
_HEADROOM_BLOCKS = 2  # left for each running sequence when one more starts, so that those who run can grow
_LOOKAHEAD = 112  # waiting requests that are ordered, the earliest deadlines first: a plan's cost is bounded
_LOOKAHEAD_PER_SLOT = 4  # more of them for each free running slot
_FLOOR_TOKENS = 20  # up to which an answer's gain is spent before it is made, where almost all get there
_CALM_LOAD = 0.5  # of prompts with an SLO, below which they are served as they came where all can be in time
_BURST_MIXING = 30  # times what mixing costs: how much of that one step may spend
_EARLY_DECODE = 2.0  # the limit of an early decode keeps this share of the error margin, divided by its tokens so far

_NONE = Reason.NONE  # members of an enum are slow to look up
_WAIT_BLOCKS, _WAIT_RUNNING_SLOT = int(Reason.WAIT_BLOCKS), int(Reason.WAIT_RUNNING_SLOT)
_WAIT_TIME, _WAIT_ORDER = int(Reason.WAIT_TIME), int(Reason.WAIT_ORDER)
_WAIT_COALESCE, _DEFERRED = int(Reason.WAIT_COALESCE), int(Reason.DEFERRED)
_RELEGATED, _AGED = int(Reason.RELEGATED), int(Reason.AGED)


class Lens:
    """Keeps private state between steps: deadlines, the order of the queue, who missed, what is owed to whom.

    Args:
        options: see LensOptions.
    """

    name = "lens"

    def __init__(self, **options: float) -> None:
        self.options = o = LensOptions(**options)
        self.traits = PolicyTraits(
            order="deadline" if o.order else "arrival",
            relegates=bool(o.order),
            step_tokens=int(o.budget),
            by_tpot=bool(o.limit),
        )
        self._guard = LengthGuard(o.goal_long)
        self._relegation = RelegationQueue(o.share, o.shed_s)
        self._step_cap = StepCap()
        self._cap_prompts_s = _INF
        self._slot_releases = SlotReleaseRate()
        self._length_floor = OutputLengthFloor(_FLOOR_TOKENS)
        self._deadlines = Deadlines(0)
        self._arrivals = -1
        self._queue: I4 = np.zeros(0, np.int32)  # waiting slots by deadline
        self._seen_tokens = _SEEN_TOKENS
        self._costs: MarginalCosts | None = None
        self._plans = 0

    def plan(self, view: EngineView, now: float) -> StepPlan:
        deadlines, arrived = self._observe(view, now)
        step = self._take_decodes(view, deadlines, now)
        costs = self._marginal_costs(view, step, arrived, now)
        decode_s = step.time.mean_s
        deadlines.renew_e2e(view, step.decodes, decode_s)
        limit = self._step_limit(view, deadlines, step, costs, decode_s, now)
        if not len(self._queue) and not step.prompts:
            return self._finish_without_prompts(view, step, limit, decode_s)
        prompts, relegated = self._prompts(view, step, costs)
        rate, limit = self._prefill_rate(view, step, limit, decode_s, may_burst=not len(relegated))
        calm = not len(relegated) and self._step_cap.load < _CALM_LOAD
        context = PlanContext(view, now, deadlines, costs, limit, rate, calm)
        can_serve = step.free_running_slots > 0 or len(step.prompts) > 0
        selection = self._select(context, step, prompts, relegated, can_serve)
        coalesce = can_serve and rate.coalesces and not step.empty and can_wait(context, selection)
        self._explain(step, selection, can_serve, coalesce)
        if can_serve and not coalesce:
            self._fill(context, step, selection)
        return self._finish(context, step, selection, can_serve, coalesce)

    # ---- observe -------------------------------------------------------------------------------------------------

    def _observe(self, view: EngineView, now: float) -> tuple[Deadlines, I4]:
        """Deadlines, queue and rates brought up to date, and slots that are new; work only for those."""
        slots = len(view.columns.known_tokens)
        if len(self._deadlines.tpot_s) != slots:
            self._deadlines = Deadlines(slots)
            self._deadlines.update(view, view.running)
            self._relegation.reset(slots)
            self._arrivals = -1
        deadlines, waiting = self._deadlines, view.waiting
        arrived = waiting[:0]
        if view.arrivals != self._arrivals:
            self._arrivals = view.arrivals
            arrived = deadlines.update(view, waiting)
            self._queue = waiting
            if self.options.order:
                self._queue = waiting[deadlines.prefill_due_s[waiting].argsort(kind="stable")]
        elif len(self._queue) != len(waiting):
            waits = np.zeros(slots, np.bool_)
            waits[waiting] = True
            self._queue = self._queue[waits[self._queue]]
        self._slot_releases.observe(len(view.running), now)
        return deadlines, arrived

    def _take_decodes(self, view: EngineView, deadlines: Deadlines, now: float) -> Step:
        headroom = _HEADROOM_BLOCKS if self._cap_prompts_s < _INF else 1  # where nobody has an SLO, as fcfs
        step = Step(view, int(self.options.budget) or None, headroom)
        step.take_decodes(victims(view, deadlines, now))
        return step

    def _marginal_costs(self, view: EngineView, step: Step, arrived: I4, now: float) -> MarginalCosts:
        """They and the cap change slowly, and are asked for anew only now and then."""
        self._plans += 1
        renew = self._costs is None or self._plans <= 2 * _COSTS_EVERY or self._plans % _COSTS_EVERY == 0
        if self._costs is None or renew:
            self._costs = marginal_costs(view.model, step.features, min(self._seen_tokens, 1024))
        if len(arrived) and self._note_arrivals(view, arrived, self._costs, now):
            renew |= self._cap_prompts_s == _INF
        if renew:
            self._cap_prompts_s = self._step_cap.prompts_s(view.model, view.max_batch_tokens, now)
        return self._costs

    def _note_arrivals(self, view: EngineView, arrived: I4, costs: MarginalCosts, now: float) -> bool:
        """Tell the cap of those among new requests that have an SLO which can be met; whether there are any."""
        d, c = self._deadlines, view.columns
        arrived = arrived[(d.first_due_s[arrived] < _INF) & d.attainable[arrived]]
        if not len(arrived):
            return False
        cached = c.context_tokens(arrived)
        work_s = costs.single_s + costs.work_s(cached, c.known_tokens[arrived] - cached)
        self._step_cap.arrived(now, d.first_due_s[arrived] - c.arrival_s[arrived] - work_s, work_s)
        return True

    # ---- step budget ---------------------------------------------------------------------------------------------

    def _step_limit(
        self, view: EngineView, deadlines: Deadlines, step: Step, costs: MarginalCosts, decode_s: float, now: float
    ) -> StepLimit:
        decodes, floor_tokens = step.decodes, 0
        if len(decodes):
            generated = view.columns.generated_tokens
            self._length_floor.observe(decodes, generated[decodes], len(generated))
            floor_tokens = self._length_floor.floor_tokens()
        return step_limit(
            view,
            deadlines,
            decodes,
            now,
            decode_s=decode_s,
            single_s=costs.single_s,
            cap_s=decode_s + self._cap_prompts_s,
            floor_tokens=floor_tokens,
        )

    def _prefill_rate(
        self, view: EngineView, step: Step, limit: StepLimit, decode_s: float, *, may_burst: bool
    ) -> tuple[PrefillRate, StepLimit]:
        """The rate, and the limit that it follows from: a longer one where what early decodes will gain is spent."""
        o, model, base = self.options, view.model, step.features
        extra_s = mixing_cost_s(model, base, decode_s)
        burst_s = min(limit.burst_s, decode_s + _BURST_MIXING * extra_s)
        if burst_s > limit.limit_s and may_burst:
            limit = limit._replace(limit_s=burst_s, slot=-1)
        if not o.limit or limit.limit_s == _INF:
            return fixed_rate(model, base, step.tokens, decode_s, extra_s), limit
        factor = 1.0
        quantile = o.quantile
        if limit.slot >= 0:  # it may end before chance evens out
            quantile = max(quantile, _EARLY_DECODE / int(view.columns.generated_tokens[limit.slot]))
        if quantile:
            small = StepFeatures(base.tokens + 16, base.sequences + 1, 1, 0.0, base.decode_kv_tokens)
            time = model.predict(small)
            factor += quantile * (time.upper_s / time.mean_s - 1.0)
        cap_s = decode_s + self._cap_prompts_s
        return prefill_rate(limit, decode_s, extra_s, factor=factor, coalescing=o.coalescing, cap_s=cap_s), limit

    # ---- select --------------------------------------------------------------------------------------------------

    def _prompts(self, view: EngineView, step: Step, costs: MarginalCosts) -> tuple[Prompts, I4]:
        """Prompts that are not relegated, in the order to serve them; and the slots of those that are."""
        c, by_deadline = view.columns, bool(self.options.order)
        waiting, relegated = self._queue, self._queue[:0]
        lookahead = _LOOKAHEAD + _LOOKAHEAD_PER_SLOT * step.free_running_slots
        if len(waiting) > lookahead:
            step.reasons[waiting] = _WAIT_ORDER
            if view.over_share is not None:  # one tenant's queue must not hide the others
                waiting = waiting[view.over_share[waiting].argsort(kind="stable")]
        if by_deadline:
            waiting, relegated = _without_relegated(view, waiting)
        slots = waiting[:lookahead]
        if step.prompts:
            partial = np.array(step.prompts, np.int32)
            if by_deadline:
                partial, also_relegated = _without_relegated(view, partial)
                relegated = np.concatenate([also_relegated, relegated])
            slots = np.concatenate([partial, slots])
        due_s = self._deadlines.prefill_due_s[slots]
        if by_deadline:
            order = in_order(due_s, self._deadlines.tpot_s[slots], precedence(view, slots, due_s))
            slots, due_s = slots[order], due_s[order]
        cached = c.context_tokens(slots)
        left = c.known_tokens[slots] - cached
        return Prompts(slots, cached, left, costs.work_s(cached, left), due_s), relegated

    def _select(self, context: PlanContext, step: Step, prompts: Prompts, relegated: I4, can_serve: bool) -> Selection:
        if not self.options.order:
            return Selection(prompts, prompts[:0], relegated[:0], relegated, prompts.work_s.cumsum())
        return select(
            context,
            prompts,
            relegated,
            free_running_slots=step.free_running_slots,
            slot_releases=self._slot_releases,
            guard=self._guard if self.options.goal_long else None,
            defer_some=can_serve,
        )

    def _explain(self, step: Step, selection: Selection, can_serve: bool, coalesce: bool) -> None:
        """Why prompts wait, until they are served."""
        waits = (_WAIT_COALESCE if coalesce else _WAIT_TIME) if can_serve else _WAIT_RUNNING_SLOT
        step.reasons[selection.on_time.slots] = waits
        if selection.has_others:
            step.reasons[selection.deferred.slots] = _DEFERRED
            step.reasons[selection.relegated] = _RELEGATED

    # ---- fill ----------------------------------------------------------------------------------------------------

    def _fill(self, context: PlanContext, step: Step, selection: Selection) -> None:
        view, on_time, deferred, relegated = context.view, selection.on_time, selection.deferred, selection.relegated
        fill = self._empty_fill(context, step)
        may_start = not step.preempted
        passed_over = np.concatenate([relegated, self._overtaken(context, step, selection)])
        if len(passed_over):
            slot_wait_s = self._slot_releases.slot_wait_s(view.max_running)
            may_start = self._relegation.serve_aged(fill, context, passed_over, may_start, slot_wait_s)
        end_by_s = on_time.due_s - (context.now + RESPONSE_MARGIN_S) if self.options.limit else None
        self._serve(fill, on_time, may_start, end_by_s)
        if may_start and len(on_time):
            self._preempt_relegated(fill, context, on_time)
        if fill.open and len(deferred):
            self._serve(fill, deferred, may_start)
        if fill.open and len(relegated) and not waits_for_decodes(step, on_time):
            self._relegation.backfill(fill, view, relegated, may_start)
        if step.empty:
            force(step, [*on_time.slots.tolist(), *deferred.slots.tolist(), *relegated.tolist()])

    def _empty_fill(self, context: PlanContext, step: Step) -> Fill:
        costs, started_s = context.costs, context.rate.decode_s
        if step.prompts:
            started_s += len(step.prompts) * costs.sequence_s
            started_s += costs.kv_token_s * int(context.view.columns.known_tokens[step.prompts].sum())
        return Fill(step, context.rate.step_s, started_s, costs, context.limit.tightest_tpot_s, self._seen_tokens)

    def _overtaken(self, context: PlanContext, step: Step, selection: Selection) -> I4:
        """Those without an SLO, while prompts with one are served before them."""
        due_s, slots = context.deadlines.first_due_s, self._queue
        have_slo = (selection.on_time.due_s < _INF).any() or len(selection.deferred)
        if not self.options.order or not have_slo:
            return slots[:0]
        if len(slots) and due_s[slots[-1]] < _INF:  # they are at the end of the queue
            slots = slots[:0]
        if step.prompts:
            slots = np.concatenate([np.array(step.prompts, np.int32), slots])
        overtaken: I4 = slots[np.isinf(due_s[slots]) & ~context.view.columns.relegated[slots]]
        return overtaken

    def _serve(self, fill: Fill, prompts: Prompts, may_start: bool, end_by_s: F8 | None = None) -> None:
        """end_by_s: in how many seconds a step must end in which each prompt of those on time ends."""
        step, tpot_s, over_share = fill.step, self._deadlines.tpot_s, fill.step.view.over_share
        partial = set(step.prompts)
        rows = zip(prompts.slots.tolist(), prompts.context.tolist(), prompts.left.tolist(), strict=True)
        for n, (slot, cached, left) in enumerate(rows):
            if not fill.open:
                return
            if not may_start and slot not in partial:
                continue
            if step.reasons[slot] == _AGED:  # it has computed out of its share
                continue
            before, reason = step.taken, _NONE
            spare = over_share is not None and bool(over_share[slot])
            if slot in partial:
                fill.resume(slot, cached, left)
            elif may_start:
                reason = fill.start(slot, cached, left, float(tpot_s[slot]), spare=spare)
            if end_by_s is not None and step.taken == before + left:
                fill.end_by(float(end_by_s[n]))
            elif reason is not _NONE:
                step.reasons[slot] = reason
                no_blocks = reason is Reason.WAIT_BLOCKS and prompts.due_s[n] == _INF
                if not spare and (no_blocks or reason is Reason.WAIT_RUNNING_SLOT):
                    rest = prompts.slots[n:]
                    step.reasons[rest[step.columns.blocks[rest] == 0]] = reason
                    may_start = False

    def _preempt_relegated(self, fill: Fill, context: PlanContext, on_time: Prompts) -> None:
        """Make room for the first of those on time that cannot start for lack of KV or a running slot.

        A relegated, partially prefilled prompt gives way.
        """
        step = fill.step
        if len(step.prompts) == 0:
            return
        waits = step.reasons[on_time.slots]
        lacking = np.nonzero(((waits == _WAIT_BLOCKS) | (waits == _WAIT_RUNNING_SLOT)) & (on_time.due_s < _INF))[0]
        preempted_s = self._relegation.preempted_s
        victim = to_preempt_for(step, context.view, preempted_s, context.now) if len(lacking) else None
        if victim is not None:
            step.preempt(victim)
            preempted_s[victim] = context.now
            self._serve(fill, on_time[lacking[:1]], True)

    # ---- finish --------------------------------------------------------------------------------------------------

    def _finish_without_prompts(self, view: EngineView, step: Step, limit: StepLimit, decode_s: float) -> StepPlan:
        self._slot_releases.planned(view.max_running - step.free_running_slots)
        return step.plan(restore=resumed(view, step, limit), notes=_notes(limit, decode_s))

    def _finish(
        self, context: PlanContext, step: Step, selection: Selection, can_serve: bool, coalesce: bool
    ) -> StepPlan:
        view, rate, on_time = context.view, context.rate, selection.on_time
        self._slot_releases.planned(view.max_running - step.free_running_slots)
        restored = resumed(view, step, context.limit)
        refused: list[int] = []
        if len(selection.relegated):
            restorable, refused = self._relegation.review(step, context, selection.relegated)
            restored = (*restored, *restorable)
        self._seen_tokens = max(self._seen_tokens, step.taken)
        self._learn(view, step, selection.infeasible)
        notes = _notes(context.limit, rate.decode_s)
        notes["coalesces"], notes["extra_ms"], notes["slowdown"] = float(coalesce), 1000 * rate.extra_s, rate.slowdown
        notes["on_time"], notes["deferred"] = float(len(on_time)), float(len(selection.deferred))
        notes["relegated"] = float(len(selection.relegated))
        return step.plan(
            relegate=tuple(selection.infeasible.tolist()),
            restore=restored,
            refuse=tuple(refused),
            notes=notes,
            due_s=self._deadlines.prefill_due_s,
        )

    def _learn(self, view: EngineView, step: Step, infeasible: I4) -> None:
        c = view.columns
        for slot in infeasible.tolist():
            if not c.generated_tokens[slot]:
                self._guard.decided(int(c.prompt_tokens[slot]), True)
        for slot in step.finished_prompts():
            if not (c.generated_tokens[slot] or c.relegated[slot]):
                self._guard.decided(int(c.prompt_tokens[slot]), False)


def _without_relegated(view: EngineView, slots: I4) -> tuple[I4, I4]:
    """Those of slots `[N]` that are not relegated, and those that are."""
    relegated = view.columns.relegated[slots]
    if not np.count_nonzero(relegated):
        return slots, slots[:0]
    return slots[~relegated], slots[relegated]


def _notes(limit: StepLimit, decode_s: float) -> dict[str, float]:
    return {"limit_ms": 1000 * limit.limit_s, "limit_slot": float(limit.slot), "decode_ms": 1000 * decode_s}
