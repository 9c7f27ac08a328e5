"""LENS: each step, the work that keeps the most requests within their promises.

Decodes run always; how long the step may take follows from what their mean times per token allow (limit.py). Into that
time go prompts by deadline, less those that would make more of the others late than they are worth (order.py); where
mixed steps are dear, time is saved up for fewer, longer ones (pace.py). Prompts whose first token cannot come in time
any more are relegated and get what is left over, and a share of the step when they have grown old (behind.py).
"""

from __future__ import annotations

from dataclasses import dataclass, fields

import numpy as np

from nexusengine.errors import ConfigError
from nexusengine.lens.behind import Behind
from nexusengine.lens.deadlines import Deadlines
from nexusengine.lens.fill import ChunkRules, Fill
from nexusengine.lens.guard import LengthGuard
from nexusengine.lens.limit import LimitRules, StepLimit, step_limit
from nexusengine.lens.order import by_deadline, put_off
from nexusengine.lens.pace import Outlook, Pace, look_ahead, pace_of
from nexusengine.lens.plan import Reason, StepPlan
from nexusengine.lens.pressure import to_take_back, victims
from nexusengine.lens.step import Step
from nexusengine.lens.view import F8, I4, Bools, EngineView
from nexusengine.perf.features import StepFeatures

_INF = float("inf")
_SEEN_TOKENS = 512  # a step of this size is planned before any was seen


@dataclass(frozen=True, slots=True)
class LensOptions:
    """order, limit: 0 takes that part away (for ablations): prompts in order of arrival and nobody relegated; `budget`
    tokens a step instead of a time limit. quantile: how far limits are drawn from the predicted mean (0) to its upper
    bound (1). slack: share of every limit that is kept.

    cap_ms, catch_up, bank: see LimitRules; admit, chunk, crumb, tile: see ChunkRules; saving: see pace_of. margin:
    share of a cycle of steps by which first tokens are planned before they are due, and answer_ms for the way back.
    goal, goal_long: see LengthGuard; goal_long 0 turns it off. share, patience_s, give_up_s: see Behind. headroom: KV
    blocks left for each running sequence when one more starts. lookahead: how many waiting requests are ordered, the
    earliest deadlines first.
    """

    order: float = 1
    limit: float = 1
    quantile: float = 0
    slack: float = 0.02
    budget: float = 0
    cap_ms: float = 120
    catch_up: float = 0.7
    bank: float = 1
    saving: float = 10
    margin: float = 0.5
    commit: float = 0
    answer_ms: float = 3
    admit: float = 0.95
    goal: float = 0.9
    goal_long: float = 0.75
    share: float = 0.02
    patience_s: float = 20
    give_up_s: float = 60
    chunk: float = 8192
    crumb: float = 16
    tile: float = 0
    headroom: float = 2
    lookahead: float = 256

    def __post_init__(self) -> None:
        for field in fields(self):
            value = getattr(self, field.name)
            if not 0 <= value < _INF:
                raise ConfigError(f"lens: {field.name} must be a number >= 0, got {value}", param="scheduler")


@dataclass(frozen=True, slots=True)
class Prompts:
    """Prompts to compute, in the order to serve them. `[N]`: slot, tokens in the KV cache when it computes next, tokens
    left, whether it holds KV already, predicted seconds that the whole rest adds to a step, instant by which it must be
    done."""

    slots: I4
    context: I4
    left: I4
    begun: Bools
    work_s: F8
    due_s: F8

    def __getitem__(self, chosen: I4 | Bools | slice) -> Prompts:
        return Prompts(
            self.slots[chosen],
            self.context[chosen],
            self.left[chosen],
            self.begun[chosen],
            self.work_s[chosen],
            self.due_s[chosen],
        )


class Lens:
    """Keeps private state between steps: deadlines, the order of the queue, who was lost, what is owed to whom."""

    name = "lens"

    def __init__(self, **options: float) -> None:
        self.options = o = LensOptions(**options)
        self._limits = LimitRules(cap_s=o.cap_ms / 1000, catch_up=o.catch_up, bank=o.bank)
        self._chunks = ChunkRules(int(o.chunk), int(o.crumb), int(o.tile), o.admit)
        self._guard = LengthGuard(o.goal, o.goal_long)
        self._behind = Behind(o.share, o.patience_s, o.give_up_s)
        self._deadlines = Deadlines(0)
        self._arrivals = -1
        self._queue: I4 = np.zeros(0, np.int32)  # waiting slots by deadline
        self._seen_tokens = _SEEN_TOKENS

    def plan(self, view: EngineView, now: float) -> StepPlan:
        o, c = self.options, view.columns
        deadlines = self._look(view)
        step = Step(view, int(o.budget) or None, headroom=int(o.headroom))
        step.take_decodes(victims(view, deadlines, now))
        base = step.features

        prompts, behind = self._prompts(view, step)
        outlook = look_ahead(
            view.model,
            base,
            len(step.prompts),
            int(c.known_tokens[step.prompts].sum()) if step.prompts else 0,
            prompts.context,
            prompts.left,
        )
        limit = step_limit(view, deadlines, step.decodes, now, outlook.decode_s, outlook.single_s, self._limits)
        pace = self._pace(view, step, limit, outlook)
        prompts = Prompts(
            prompts.slots,
            prompts.context,
            prompts.left,
            prompts.begun,
            outlook.work_s,
            deadlines.prefill_due_s[prompts.slots],
        )
        kept, off, late = self._order(view, prompts, pace, outlook, now)
        behind = np.concatenate([behind, late]) if len(late) else behind
        done_s = kept.work_s.cumsum()
        save = pace.saves and self._can_wait(kept, done_s, pace, outlook, len(behind) + len(off.slots) > 0, now)

        step.reasons[kept.slots] = Reason.WAIT_SAVING if save else Reason.WAIT_TIME
        step.reasons[off.slots] = Reason.PUT_OFF
        step.reasons[behind] = Reason.RELEGATED
        refuse: tuple[int, ...] = ()
        if not save or step.empty:
            fill = Fill(step, pace.step_s, outlook, limit.tightest_tpot_s, self._seen_tokens, self._chunks)
            newcomers = not step.preempted
            if len(behind):
                newcomers = self._behind.share(fill, view, deadlines, behind, pace, outlook, newcomers, now)
            self._serve(fill, kept, newcomers)
            if newcomers and len(kept.slots):
                self._take_back(fill, view, kept, now)
            if fill.open:
                self._serve(fill, off, newcomers)
            if fill.open and len(behind):
                self._behind.leftover(fill, view, behind, newcomers)
            if step.empty:
                self._force(step, [*kept.slots.tolist(), *off.slots.tolist(), *behind.tolist()])
        if len(behind):
            refuse = self._behind.give_up(step, view, deadlines, behind, now)
        self._seen_tokens = max(self._seen_tokens, step.taken)
        first_token_s = np.full(len(c.known_tokens), np.nan)
        first_token_s[kept.slots] = now + outlook.decode_s + outlook.extra_s + done_s * pace.dilution
        self._learn(view, step, late)
        return step.plan(
            relegate=tuple(late.tolist()),
            restore=self._restore(view, step, limit, behind, outlook, now),
            refuse=refuse,
            first_token_s=first_token_s,
            notes={
                "limit_ms": 1000 * limit.limit_s,
                "limit_slot": float(limit.slot),
                "decode_ms": 1000 * outlook.decode_s,
                "extra_ms": 1000 * outlook.extra_s,
                "dilution": pace.dilution,
                "saving": float(save),
                "kept": float(len(kept.slots)),
                "put_off": float(len(off.slots)),
                "relegated": float(len(behind)),
            },
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

    def _prompts(self, view: EngineView, step: Step) -> tuple[Prompts, I4]:
        """Prompts that are not relegated, those that have begun first; and the slots of those that are."""
        c, queue = view.columns, self._queue
        begun: I4 = np.array(step.prompts, np.int32)
        behind: I4 = begun[:0]
        step.reasons[queue] = Reason.WAIT_ORDER
        if self.options.order:
            for_later = c.relegated[queue]
            if for_later.any():
                behind, queue = queue[for_later], queue[~for_later]
            if len(begun):
                for_later = c.relegated[begun]
                behind, begun = np.concatenate([begun[for_later], behind]), begun[~for_later]
        queue = queue[: int(self.options.lookahead)]
        slots = np.concatenate([begun, queue])
        context = np.concatenate([c.computed_tokens[begun], c.cached_tokens[queue]])
        holds_kv = np.zeros(len(slots), np.bool_)
        holds_kv[: len(begun)] = True
        nothing = np.zeros(0)
        return Prompts(slots, context, c.known_tokens[slots] - context, holds_kv, nothing, nothing), behind

    def _pace(self, view: EngineView, step: Step, limit: StepLimit, outlook: Outlook) -> Pace:
        o = self.options
        if not o.limit:
            rows = step.features.sequences
            full = StepFeatures(rows + max(step.tokens, 1), rows + 1, 1, 0.0, step.features.decode_kv_tokens)
            step_s = view.model.predict(full).mean_s
            prompts_s = max(step_s - outlook.decode_s - outlook.extra_s, 0.05 * step_s)
            return Pace(_INF, prompts_s, 0.0, 0.0, step_s / prompts_s, prompts_s)
        factor = 1.0
        if o.quantile:
            f = step.features
            mixed = view.model.predict(StepFeatures(f.tokens + 16, f.sequences + 1, 1, 0.0, f.decode_kv_tokens))
            factor += o.quantile * (mixed.upper_s / mixed.mean_s - 1.0)
        return pace_of(limit, outlook, factor, o.slack, o.saving, self._limits.cap_s)

    def _order(
        self, view: EngineView, prompts: Prompts, pace: Pace, outlook: Outlook, now: float
    ) -> tuple[Prompts, Prompts, I4]:
        """Those to serve, in order; those to put off; slots that are late whatever is done."""
        o, c = self.options, view.columns
        late = prompts.slots[:0]
        if not o.order or not len(prompts.slots):
            return prompts, prompts[:0], late
        slack_s = prompts.due_s - (now + outlook.decode_s + outlook.extra_s + o.answer_ms / 1000)
        doomed = prompts.work_s > slack_s
        if doomed.any():
            late = prompts.slots[doomed]
            prompts, slack_s = prompts[~doomed], slack_s[~doomed]
        if len(prompts.slots) > 1:
            order, ranked = by_deadline(prompts.due_s, self._deadlines.tpot_s[prompts.slots], c.priority[prompts.slots])
            prompts, slack_s = prompts[order], slack_s[order]
        else:
            ranked = False
        allowed_s = slack_s / pace.dilution - o.margin * pace.margin_s
        if not (prompts.work_s.cumsum() > allowed_s).any():
            return prompts, prompts[:0], late
        rank = c.priority[prompts.slots] * 2 if ranked else np.zeros(len(prompts.slots), np.int32)
        if o.commit:
            rank = rank + prompts.begun
        if o.goal_long and self._guard.active:
            rank = rank + self._guard.protected(c.prompt_tokens[prompts.slots])
        off = put_off(prompts.work_s, allowed_s, rank.tolist())
        return prompts[~off], prompts[off], late

    def _can_wait(self, kept: Prompts, done_s: F8, pace: Pace, outlook: Outlook, more: bool, now: float) -> bool:
        """Whether prompts can wait for a decode-only step: there is more to do than fits now, and none of those that
        would be done in this step would be late."""
        if not len(done_s):
            return more
        if done_s[-1] < pace.prompts_s and not more:
            return False
        done_later_s = now + pace.step_s + pace.gain_s + outlook.decode_s + self.options.answer_ms / 1000
        return not (kept.due_s[done_s <= pace.prompts_s] < done_later_s).any()

    def _restore(
        self, view: EngineView, step: Step, limit: StepLimit, behind: I4, outlook: Outlook, now: float
    ) -> tuple[int, ...]:
        """Relegated slots whose promise can be kept after all: decodes that were resumed in time, and prompts that the
        prediction wronged."""
        if not self.options.order:
            return ()
        c, decodes = view.columns, step.decodes
        again = c.relegated[decodes] & ~limit.lost
        back = decodes[again & (c.generated_tokens[decodes] > 0)].tolist() if again.any() else []
        if len(behind):
            back += self._behind.wronged(step, view, self._deadlines, behind, outlook, now)
        return tuple(back)

    def _learn(self, view: EngineView, step: Step, late: I4) -> None:
        c = view.columns
        for slot in late.tolist():
            if not c.generated_tokens[slot]:
                self._guard.decided(int(c.prompt_tokens[slot]), True)
        for slot in step.finished_prompts():
            if not (c.generated_tokens[slot] or c.relegated[slot]):
                self._guard.decided(int(c.prompt_tokens[slot]), False)

    # ---- who gets it ---------------------------------------------------------------------------------------------

    def _serve(self, fill: Fill, prompts: Prompts, newcomers: bool) -> None:
        step = fill.step
        if not step.seats or not newcomers:
            waiting = ~prompts.begun
            if not step.seats:
                step.reasons[prompts.slots[waiting]] = Reason.WAIT_SEATS
            prompts = prompts[prompts.begun]
        tpot_s = self._deadlines.tpot_s
        rows = zip(*(a.tolist() for a in (prompts.slots, prompts.context, prompts.left, prompts.begun)), strict=True)
        for n, (slot, context, left, begun) in enumerate(rows):
            if not fill.open:
                return
            if begun:
                fill.go_on(slot, context, left)
                continue
            reason = fill.start(slot, context, left, float(tpot_s[slot]))
            if reason is Reason.WAIT_SEATS:
                self._serve(fill, prompts[n:], newcomers)
                return
            if reason is not Reason.NONE:
                step.reasons[slot] = reason

    def _take_back(self, fill: Fill, view: EngineView, kept: Prompts, now: float) -> None:
        """If the first of those to serve cannot start for lack of KV or seats, a relegated prompt that has begun gives
        way."""
        first = int(kept.begun.argmin())
        lacks = fill.step.reasons[kept.slots[first]]
        if kept.begun[first] or lacks not in (Reason.WAIT_BLOCKS, Reason.WAIT_SEATS):
            return
        victim = to_take_back(fill.step, view, self._behind.taken_back_s, now)
        if victim is not None:
            fill.step.preempt(victim)
            self._behind.taken_back_s[victim] = now
            self._serve(fill, kept[first : first + 1], True)

    def _force(self, step: Step, order: list[int]) -> None:
        """Nothing fits the limit, or KV is full of prompts that have begun: the first that can run gets a small chunk,
        and the last give way until one can."""
        crumb = max(int(self.options.crumb), 1)
        begun = set(step.prompts)
        for slot in order:
            if slot in begun:
                step.extend(slot, crumb)
            elif not step.preempted and step.admissible(slot) is Reason.NONE:
                step.admit(slot, crumb)
            if not step.empty:
                return
        last_first = [slot for slot in reversed(order) if slot in begun]
        while step.empty and len(step.prompts) > 1:
            step.preempt(last_first.pop(0))
            step.extend(last_first[-1], crumb)
