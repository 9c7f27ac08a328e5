"""LENS: each step, the work that keeps the most requests within their promises.

Decodes run always; how long the step may take follows from what their mean times per token allow (step_limit.py). Into
that time go prompts by deadline, less those that would make more of the others late than they are worth (select.py);
where mixed steps are dear, time is saved up for fewer, longer ones (prefill_rate.py). Prompts whose first token cannot
come in time any more are relegated and get what is left over, and a share of the step when they have grown old
(relegation.py). Those without an SLO come behind all deadlines, as they arrived, and get the same share when others
keep overtaking them.
"""

from __future__ import annotations

from dataclasses import dataclass, fields, replace

import numpy as np

from nexusengine.arrays import F8, I4, I8, Bools
from nexusengine.errors import ConfigError
from nexusengine.perf.features import StepFeatures
from nexusengine.scheduler.lens.deadlines import Deadlines
from nexusengine.scheduler.lens.fill import ChunkRules, Fill
from nexusengine.scheduler.lens.length_guard import LengthGuard
from nexusengine.scheduler.lens.preemption import to_take_back, victims
from nexusengine.scheduler.lens.prefill_rate import Costs, Pace, costs_of, extra_of, fixed_pace, pace_of
from nexusengine.scheduler.lens.relegation import Behind
from nexusengine.scheduler.lens.select import by_priority
from nexusengine.scheduler.lens.step_limit import LimitRules, StepLimit, step_limit
from nexusengine.scheduler.lens.survival import Survival
from nexusengine.scheduler.lens.turnover import Turnover
from nexusengine.scheduler.moore_hodgson import put_off
from nexusengine.scheduler.plan import Reason, StepPlan
from nexusengine.scheduler.step import Step
from nexusengine.scheduler.view import EngineView
from nexusengine.wire import PolicyTraits

_INF = float("inf")
_SEEN_TOKENS = 512  # a step of this size is planned before any was seen
_COSTS_EVERY = 16  # plans, after the first ones
_NONE = Reason.NONE  # members of an enum are slow to look up
_WAIT_BLOCKS, _WAIT_SEATS, _WAIT_TPOT = int(Reason.WAIT_BLOCKS), int(Reason.WAIT_SEATS), int(Reason.WAIT_TPOT)
_WAIT_TIME, _WAIT_ORDER, _WAIT_SAVING = int(Reason.WAIT_TIME), int(Reason.WAIT_ORDER), int(Reason.WAIT_SAVING)
_PUT_OFF, _RELEGATED, _AGED = int(Reason.PUT_OFF), int(Reason.RELEGATED), int(Reason.AGED)


@dataclass(frozen=True, slots=True)
class LensOptions:
    """order, limit: 0 takes that part away (for ablations): prompts in order of arrival and nobody relegated; `budget`
    tokens a step instead of a time limit. quantile: how far limits are drawn from the predicted mean (0) to its upper
    bound (1). young: the same where a young request sets the limit, divided by its tokens so far: it may end before
    chance evens out. slack: share of every limit that is kept.

    cap_ms, catch_up, bank: see LimitRules; sure: tokens up to which an answer's gain is spent before it is made, while
    nobody is relegated (see Survival), on steps up to spend times what mixing costs; 0: never. admit, chunk, crumb,
    tile: see ChunkRules; saving: see pace_of. margin: share of a cycle of steps by which first tokens are planned
    before they are due, and answer_ms for the way back. seat: share of the seats which are expected to come free in
    time that newcomers count on.
    goal, goal_long: see LengthGuard; goal_long 0 turns it off. share, patience_s, give_up_s: see Behind. headroom: KV
    blocks left for each running sequence when one more starts. lookahead: how many waiting requests are ordered, the
    earliest deadlines first.
    """

    order: float = 1
    limit: float = 1
    quantile: float = 0
    young: float = 2
    slack: float = 0.02
    budget: float = 0
    cap_ms: float = 120
    catch_up: float = 0.7
    bank: float = 1
    sure: float = 20
    spend: float = 30
    saving: float = 10
    margin: float = 0.25
    seat: float = 0.5
    answer_ms: float = 3
    admit: float = 0.95
    goal: float = 0.9
    goal_long: float = 0.75
    share: float = 0.03
    patience_s: float = 20
    give_up_s: float = 60
    chunk: float = 8192
    crumb: float = 16
    tile: float = 0
    headroom: float = 2
    lookahead: float = 128

    def __post_init__(self) -> None:
        for field in fields(self):
            value = getattr(self, field.name)
            if not 0 <= value < float("inf"):
                raise ConfigError(f"lens: {field.name} must be a number >= 0, got {value}", param="scheduler")


@dataclass(frozen=True, slots=True)
class Prompts:
    """Prompts to compute, in the order to serve them. `[N]`: slot, tokens in the KV cache when it computes next, tokens
    left, predicted seconds that the whole rest adds to a step, instant by which it must be done (infinite without an
    SLO)."""

    slots: I4
    context: I4
    left: I4
    work_s: F8
    due_s: F8

    def __getitem__(self, chosen: I8 | Bools | slice) -> Prompts:
        return Prompts(
            self.slots[chosen], self.context[chosen], self.left[chosen], self.work_s[chosen], self.due_s[chosen]
        )

    def __add__(self, behind: Prompts) -> Prompts:
        """These, then those behind."""
        return Prompts(
            np.concatenate([self.slots, behind.slots]),
            np.concatenate([self.context, behind.context]),
            np.concatenate([self.left, behind.left]),
            np.concatenate([self.work_s, behind.work_s]),
            np.concatenate([self.due_s, behind.due_s]),
        )


class Lens:
    """Keeps private state between steps: deadlines, the order of the queue, who was lost, what is owed to whom."""

    name = "lens"

    def __init__(self, **options: float) -> None:
        self.options = o = LensOptions(**options)
        self._limits = limits = LimitRules(cap_s=o.cap_ms / 1000, catch_up=o.catch_up, bank=o.bank)
        self.traits = PolicyTraits(
            order="deadline" if o.order else "arrival",
            relegates=bool(o.order),
            step_tokens=int(o.budget),
            step_s=limits.cap_s if o.limit else _INF,
            single_steps=limits.cap_steps,
            by_tpot=bool(o.limit),
        )
        self._chunks = ChunkRules(int(o.chunk), int(o.crumb), int(o.tile), o.admit)
        self._guard = LengthGuard(o.goal, o.goal_long)
        self._behind = Behind(o.share, o.patience_s, o.give_up_s)
        self._turnover = Turnover()
        self._survival = Survival(int(o.sure))
        self._deadlines = Deadlines(0)
        self._arrivals = -1
        self._queue: I4 = np.zeros(0, np.int32)  # waiting slots by deadline
        self._seen_tokens = _SEEN_TOKENS
        self._costs: Costs | None = None
        self._plans = 0

    def plan(self, view: EngineView, now: float) -> StepPlan:
        o, model = self.options, view.model
        deadlines = self._look(view)
        self._turnover.look(len(view.running), now)
        step = Step(view, int(o.budget) or None, headroom=int(o.headroom))
        step.take_decodes(victims(view, deadlines, now))
        base = step.features
        costs = self._renewed_costs(view, step)
        decode_s = model.predict(base).mean_s
        sure_tokens = self._sure_tokens(view, step.decodes)
        limit = step_limit(view, deadlines, step.decodes, now, decode_s, costs.single_s, self._limits, sure_tokens)
        if not len(self._queue) and not step.prompts:
            self._turnover.planned(view.max_running - step.seats)
            return step.plan(restore=self._resumed(view, step, limit), notes=_notes(limit, decode_s))
        prompts, behind = self._prompts(view, step, costs)
        extra_s = extra_of(model, base, decode_s)
        once_s = min(limit.once_s, decode_s + o.spend * extra_s)
        if once_s > limit.limit_s and not len(behind):
            limit = replace(limit, limit_s=once_s, slot=-1)
        pace = self._pace(view, step, limit, decode_s, extra_s)
        can_serve = step.seats > 0 or len(step.prompts) > 0
        kept, off, late = self._order(view, prompts, pace, now, step.seats, choose=can_serve)
        if len(late):
            behind = np.concatenate([behind, late])
        done_s = kept.work_s.cumsum()
        more = len(behind) + len(off.slots) > 0
        save = can_serve and pace.saves and not step.empty and self._can_wait(kept, done_s, pace, more, now)

        step.reasons[kept.slots] = (_WAIT_SAVING if save else _WAIT_TIME) if can_serve else _WAIT_SEATS
        if more:
            step.reasons[off.slots] = _PUT_OFF
            step.reasons[behind] = _RELEGATED
        if can_serve and not save:
            started_s = decode_s
            if step.prompts:
                started_s += len(step.prompts) * costs.sequence_s
                started_s += costs.kv_token_s * int(view.columns.known_tokens[step.prompts].sum())
            fill = Fill(step, pace.step_s, started_s, costs, limit.tightest_tpot_s, self._seen_tokens, self._chunks)
            self._fill(fill, view, kept, off, behind, costs, pace, now)
        self._turnover.planned(view.max_running - step.seats)
        back = self._resumed(view, step, limit)
        refused: list[int] = []
        if len(behind):
            wronged, refused = self._behind.review(step, view, deadlines, behind, costs, pace, now)
            back = (*back, *wronged)
        self._seen_tokens = max(self._seen_tokens, step.taken)
        self._learn(view, step, late)
        first_token_s = np.full(len(step.reasons), np.nan)
        if can_serve:
            first_token_s[kept.slots] = now + pace.time_for(done_s)
        notes = _notes(limit, decode_s)
        notes["saving"], notes["extra_ms"], notes["dilution"] = float(save), 1000 * pace.extra_s, pace.dilution
        notes["kept"], notes["put_off"], notes["relegated"] = (
            float(len(done_s)),
            float(len(off.slots)),
            float(len(behind)),
        )
        return step.plan(
            relegate=tuple(late.tolist()), restore=back, refuse=tuple(refused), notes=notes, first_token_s=first_token_s
        )

    # ---- what there is to do -------------------------------------------------------------------------------------

    def _look(self, view: EngineView) -> Deadlines:
        """Deadlines and queue brought up to date; work only for what is new since the last step."""
        slots = len(view.columns.known_tokens)
        if len(self._deadlines.tpot_s) != slots:
            self._deadlines = Deadlines(slots)
            self._deadlines.look_at(view, view.running)
            self._behind.reset(slots)
            self._arrivals = -1
        deadlines, waiting = self._deadlines, view.waiting
        if view.arrivals != self._arrivals:
            self._arrivals = view.arrivals
            deadlines.look_at(view, waiting)
            self._queue = waiting
            if self.options.order:
                self._queue = waiting[deadlines.prefill_due_s[waiting].argsort(kind="stable")]
        elif len(self._queue) != len(waiting):
            waits = np.zeros(slots, np.bool_)
            waits[waiting] = True
            self._queue = self._queue[waits[self._queue]]
        return deadlines

    def _sure_tokens(self, view: EngineView, decodes: I4) -> int:
        if not self.options.sure or not len(decodes):
            return 0
        generated = view.columns.generated_tokens
        self._survival.look(decodes, generated[decodes], len(generated))
        return self._survival.sure_tokens()

    def _renewed_costs(self, view: EngineView, step: Step) -> Costs:
        """Marginal costs change slowly: they are asked for anew only now and then."""
        self._plans += 1
        if self._costs is None or self._plans <= 2 * _COSTS_EVERY or self._plans % _COSTS_EVERY == 0:
            self._costs = costs_of(view.model, step.features, min(self._seen_tokens, 1024))
        return self._costs

    def _pace(self, view: EngineView, step: Step, limit: StepLimit, decode_s: float, extra_s: float) -> Pace:
        o, model, base = self.options, view.model, step.features
        if not o.limit:
            return fixed_pace(model, base, step.tokens, decode_s, extra_s)
        factor = 1.0
        quantile = o.quantile
        if limit.slot >= 0:
            quantile = max(quantile, o.young / int(view.columns.generated_tokens[limit.slot]))
        if quantile:
            small = StepFeatures(base.tokens + 16, base.sequences + 1, 1, 0.0, base.decode_kv_tokens)
            time = model.predict(small)
            factor += quantile * (time.upper_s / time.mean_s - 1.0)
        cap_s = self._limits.cap_s
        return pace_of(limit, decode_s, extra_s, factor=factor, slack=o.slack, saving=o.saving, cap_s=cap_s)

    def _prompts(self, view: EngineView, step: Step, costs: Costs) -> tuple[Prompts, I4]:
        """Prompts that are not relegated, in the order to serve them; and the slots of those that are."""
        o, c, queue = self.options, view.columns, self._queue
        behind: I4 = queue[:0]
        slots = queue
        if len(queue) > o.lookahead:
            step.reasons[queue] = _WAIT_ORDER
        if o.order:
            for_later = c.relegated[queue]
            if np.count_nonzero(for_later):
                behind, slots = queue[for_later], queue[~for_later]
        slots = slots[: int(o.lookahead)]
        if step.prompts:
            begun = np.array(step.prompts, np.int32)
            if o.order:
                for_later = c.relegated[begun]
                if np.count_nonzero(for_later):
                    behind, begun = np.concatenate([begun[for_later], behind]), begun[~for_later]
            slots = np.concatenate([begun, slots])
        due_s = self._deadlines.prefill_due_s[slots]
        if o.order:
            order = due_s.argsort(kind="stable").astype(np.int32)
            priority = c.priority[slots]
            if np.count_nonzero(priority):
                order = by_priority(order, self._deadlines.tpot_s[slots], priority)
            slots, due_s = slots[order], due_s[order]
        computed = c.computed_tokens[slots]
        context = np.where(computed > 0, computed, c.cached_tokens[slots])
        left = c.known_tokens[slots] - context
        return Prompts(slots, context, left, costs.work_s(context, left), due_s), behind

    def _order(
        self, view: EngineView, prompts: Prompts, pace: Pace, now: float, free: int, *, choose: bool
    ) -> tuple[Prompts, Prompts, I4]:
        """Those to serve; those to put off (nobody, unless it is to `choose`); slots that are late whatever is done.
        Those without an SLO are behind all others, and neither put off nor late."""
        o, c = self.options, view.columns
        nobody = prompts[:0]
        late = nobody.slots
        if not o.order or not len(prompts.slots):
            return prompts, nobody, late
        promised = prompts.due_s < _INF
        if np.count_nonzero(promised) < len(promised):
            kept, put_aside, late = self._order(view, prompts[promised], pace, now, free, choose=choose)
            return kept + prompts[~promised], put_aside, late
        slack_s = prompts.due_s - (now + o.answer_ms / 1000)
        doomed = prompts.work_s > slack_s - (pace.decode_s + pace.extra_s)
        if np.count_nonzero(doomed):
            late = prompts.slots[doomed]
            prompts, slack_s = prompts[~doomed], slack_s[~doomed]
        if not choose:
            return prompts, nobody, late
        allowed_s = pace.work_until(slack_s - o.margin * pace.first_s)
        newcomers, seats, short = c.blocks[prompts.slots] == 0, None, False
        if np.count_nonzero(newcomers) > free:
            start_s = slack_s - pace.step_s - pace.hasty_dilution * prompts.work_s
            seats = self._turnover.seats_within(o.seat * start_s, free, view.max_running)
            short = bool((newcomers.cumsum() > seats).any())
        if not short and not np.count_nonzero(prompts.work_s.cumsum() > allowed_s):
            return prompts, nobody, late
        rank = 2 * c.priority[prompts.slots]
        if o.goal_long and self._guard.active:
            rank = rank + self._guard.protected(c.prompt_tokens[prompts.slots])
        off = put_off(prompts.work_s, allowed_s, rank.tolist(), newcomers, seats)
        return prompts[~off], prompts[off], late

    def _can_wait(self, kept: Prompts, done_s: F8, pace: Pace, more: bool, now: float) -> bool:
        """Whether prompts can wait for a decode-only step: there is more to do than fits now, and none of those that
        would be done in this step would be late."""
        if not len(done_s) or (done_s[-1] < pace.prompts_s and not more):
            return more
        later_s = now + pace.step_s + pace.gain_s + pace.decode_s + self.options.answer_ms / 1000
        return not (kept.due_s[: int(done_s.searchsorted(pace.prompts_s, side="right"))] < later_s).any()

    def _resumed(self, view: EngineView, step: Step, limit: StepLimit) -> tuple[int, ...]:
        """Slots that were relegated when they had been preempted, and decode in time all the same."""
        c, decodes = view.columns, step.decodes
        again = c.relegated[decodes]
        if not np.count_nonzero(again):
            return ()
        return tuple(decodes[again & ~limit.lost & (c.generated_tokens[decodes] > 0)].tolist())

    def _learn(self, view: EngineView, step: Step, late: I4) -> None:
        c = view.columns
        for slot in late.tolist():
            if not c.generated_tokens[slot]:
                self._guard.decided(int(c.prompt_tokens[slot]), True)
        for slot in step.finished_prompts():
            if not (c.generated_tokens[slot] or c.relegated[slot]):
                self._guard.decided(int(c.prompt_tokens[slot]), False)

    # ---- who gets it ---------------------------------------------------------------------------------------------

    def _fill(
        self,
        fill: Fill,
        view: EngineView,
        kept: Prompts,
        off: Prompts,
        behind: I4,
        costs: Costs,
        pace: Pace,
        now: float,
    ) -> None:
        step = fill.step
        newcomers = not step.preempted
        overtaken = np.concatenate([behind, self._overtaken(view, step, kept, off)])
        if len(overtaken):
            seat_s = self._turnover.seat_s(view.max_running)
            newcomers = self._behind.share(fill, view, self._deadlines, overtaken, costs, pace, newcomers, seat_s, now)
        self._serve(fill, kept, newcomers)
        if newcomers and len(kept.slots):
            self._take_back(fill, view, kept, now)
        if fill.open and len(off.slots):
            self._serve(fill, off, newcomers)
        if fill.open and len(behind) and not self._decodes_hold_up(step, kept):
            self._behind.leftover(fill, view, behind, newcomers)
        if step.empty:
            self._force(step, [*kept.slots.tolist(), *off.slots.tolist(), *behind.tolist()])

    def _overtaken(self, view: EngineView, step: Step, kept: Prompts, off: Prompts) -> I4:
        """Those without an SLO, while prompts with one are served before them."""
        due_s, slots = self._deadlines.first_due_s, self._queue
        if not self.options.order or not ((kept.due_s < _INF).any() or len(off.slots)):
            return slots[:0]
        if step.prompts:
            slots = np.concatenate([np.array(step.prompts, np.int32), slots])
        overtaken: I4 = slots[np.isinf(due_s[slots]) & ~view.columns.relegated[slots]]
        return overtaken

    def _serve(self, fill: Fill, prompts: Prompts, newcomers: bool) -> None:
        step, tpot_s = fill.step, self._deadlines.tpot_s
        begun = set(step.prompts)
        rows = zip(prompts.slots.tolist(), prompts.context.tolist(), prompts.left.tolist(), strict=True)
        for n, (slot, context, left) in enumerate(rows):
            if not fill.open:
                return
            if step.reasons[slot] == _AGED:  # it has computed out of its share
                continue
            if slot in begun:
                fill.go_on(slot, context, left)
            elif newcomers:
                reason = fill.start(slot, context, left, float(tpot_s[slot]))
                if reason is _NONE:
                    continue
                step.reasons[slot] = reason
                if reason is Reason.WAIT_SEATS:
                    rest = prompts.slots[n:]
                    step.reasons[rest[step.columns.blocks[rest] == 0]] = reason
                    newcomers = False

    def _decodes_hold_up(self, step: Step, kept: Prompts) -> bool:
        """Whether one who is to be in time waits for decodes to end: then the step had better be short."""
        waits = step.reasons[kept.slots[kept.due_s < _INF]]
        return bool(((waits == _WAIT_SEATS) | (waits == _WAIT_BLOCKS) | (waits == _WAIT_TPOT)).any())

    def _take_back(self, fill: Fill, view: EngineView, kept: Prompts, now: float) -> None:
        """If the first of those who are to be in time cannot start for lack of KV or seats, a relegated prompt that has
        begun gives way."""
        step = fill.step
        if len(step.prompts) == 0:
            return
        kept = kept[kept.due_s < _INF]
        waits = step.reasons[kept.slots]
        lacking = np.nonzero((waits == _WAIT_BLOCKS) | (waits == _WAIT_SEATS))[0]
        victim = to_take_back(step, view, self._behind.taken_back_s, now) if len(lacking) else None
        if victim is not None:
            step.preempt(victim)
            self._behind.taken_back_s[victim] = now
            self._serve(fill, kept[lacking[:1]], True)

    def _force(self, step: Step, order: list[int]) -> None:
        """Nothing fits the limit, or KV is full of prompts that have begun: the first that can run gets a small chunk,
        and the last give way until one can."""
        crumb = max(int(self.options.crumb), 1)
        begun = set(step.prompts)
        for slot in order:
            if slot in begun:
                step.extend(slot, crumb)
            elif not step.preempted and step.admissible(slot) is _NONE:
                step.admit(slot, crumb)
            if not step.empty:
                return
        last_first = [slot for slot in reversed(order) if slot in begun]
        while step.empty and len(step.prompts) > 1:
            step.preempt(last_first.pop(0))
            step.extend(last_first[-1], crumb)


def _notes(limit: StepLimit, decode_s: float) -> dict[str, float]:
    return {"limit_ms": 1000 * limit.limit_s, "limit_slot": float(limit.slot), "decode_ms": 1000 * decode_s}
