"""LENS: each step, the work that keeps the most requests within their promises.

Decodes run always; how long the step may take follows from what their mean times per token allow (limit.py). Into that
time go prompts by deadline, less those that would make more of the others late than they are worth (order.py); prompts
whose first token cannot come in time any more are relegated and get what is left over, and a share of the step when
they have grown old. Every duration comes from the performance model and is bounded by its upper quantile.
"""

from __future__ import annotations

from dataclasses import dataclass, fields

import numpy as np

from nexusengine.errors import ConfigError
from nexusengine.lens.deadlines import Deadlines
from nexusengine.lens.fill import ChunkRules, DecodeLoad, Fill
from nexusengine.lens.limit import LimitRules, StepLimit, step_limit
from nexusengine.lens.order import by_deadline, put_off
from nexusengine.lens.plan import Reason, StepPlan
from nexusengine.lens.pressure import victims
from nexusengine.lens.step import Step
from nexusengine.lens.view import F8, I4, Bools, EngineView
from nexusengine.perf.features import StepFeatures

_INF = float("inf")
_KV_PROBE_TOKENS = 1000.0
_RESTORE_MARGIN = 1.2
_LEAST_SHARE = 0.05  # of a step that is reckoned to be left for prompts, however many decodes there are
_TAKE_BACK_PAUSE_S = 10.0


@dataclass(frozen=True, slots=True)
class LensOptions:
    """order, limit, quantile: 0 takes that part away (for ablations): prompts in order of arrival and nobody relegated;
    `budget` tokens a step instead of a time limit; planning with means instead of upper bounds.

    cap_ms, catch_up, bank: see LimitRules; admit, chunk, crumb, tile: see ChunkRules. slack_ms: kept of every limit.
    share, patience_s: relegated requests older than their TTFT and patience_s get this share of the step's time for
    prompts. headroom: KV blocks left for each running sequence when one more starts. lookahead: how many waiting
    requests are ordered, the earliest deadlines first.
    """

    order: float = 1
    limit: float = 1
    quantile: float = 1
    budget: float = 0
    cap_ms: float = 120
    catch_up: float = 0.7
    bank: float = 0.5
    slack_ms: float = 0.5
    admit: float = 0.95
    share: float = 0.1
    patience_s: float = 20
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

    def __getitem__(self, chosen: object) -> Prompts:
        return Prompts(*(getattr(self, f.name)[chosen] for f in fields(self)))


@dataclass(frozen=True, slots=True)
class Pace:
    """decode_s: predicted duration of a step with decodes alone. step_s: mean duration of a step filled to its limit.
    budget_s: what the upper bound of its duration must stay within."""

    decode_s: float
    step_s: float
    budget_s: float

    @property
    def prompts_s(self) -> float:
        """Of a full step, for prompts."""
        return max(self.step_s - self.decode_s, _LEAST_SHARE * self.step_s)


class Lens:
    """Keeps private state between steps: deadlines, the order of the queue, and what relegated requests are owed."""

    name = "lens"

    def __init__(self, **options: float) -> None:
        self.options = o = LensOptions(**options)
        self._limits = LimitRules(cap_s=o.cap_ms / 1000, catch_up=o.catch_up, bank=o.bank)
        self._chunks = ChunkRules(int(o.chunk), int(o.crumb), int(o.tile), o.admit)
        self._deadlines: Deadlines | None = None
        self._arrivals = -1
        self._queue: I4 = np.zeros(0, np.int32)  # waiting slots by deadline
        self._owed_s = 0.0
        self._taken_back_s: F8 = np.zeros(0)

    def plan(self, view: EngineView, now: float) -> StepPlan:
        deadlines = self._look(view)
        c, queue = view.columns, self._queue
        step = Step(view, int(self.options.budget) or None, headroom=int(self.options.headroom))
        step.take_decodes(victims(view, deadlines, now))

        begun = np.array(step.prompts, np.int32)
        kept_begun, kept_queue = begun, queue
        behind: I4 = queue[:0]
        if self.options.order:
            out_begun, out_queue = c.relegated[begun], c.relegated[queue]
            behind = np.concatenate([begun[out_begun], queue[out_queue]])
            kept_begun, kept_queue = begun[~out_begun], queue[~out_queue]
        step.reasons[queue] = Reason.WAIT_ORDER
        prompts, singles = self._predict(view, step, kept_begun, kept_queue[: int(self.options.lookahead)])
        single_s, load = singles
        decode = view.model.predict(step.features)
        limit = step_limit(view, deadlines, step.decodes, now, decode.mean_s, single_s, self._limits)
        pace = self._pace(view, step, limit, decode.mean_s, decode.upper_s)

        kept, off, late = self._order(view, prompts, pace, now)
        step.reasons[kept.slots] = Reason.WAIT_TIME
        step.reasons[off.slots] = Reason.PUT_OFF
        step.reasons[late] = step.reasons[behind] = Reason.RELEGATED

        fill = Fill(step, pace.budget_s, load, limit.tightest_tpot_s, self._chunks)
        newcomers = not step.preempted
        aged = behind[now > deadlines.first_due_s[behind] + self.options.patience_s] if len(behind) else behind
        if len(aged):
            newcomers &= self._share(fill, step, view, aged, pace)
        else:
            self._owed_s = 0.0
        self._serve(fill, step, kept, newcomers)
        if newcomers and len(kept.slots):
            self._take_back(fill, step, view, kept, now)
        if fill.open:
            self._serve(fill, step, off, newcomers)
        if fill.open and len(behind) + len(late):
            self._serve_behind(fill, step, view, np.concatenate([behind, late]), newcomers)
        if step.empty:
            self._force(step, [*kept.slots.tolist(), *off.slots.tolist(), *late.tolist(), *behind.tolist()])

        first_token_s = np.full(len(c.known_tokens), np.nan)
        first_token_s[kept.slots] = now + pace.decode_s + np.cumsum(kept.work_s) * (pace.step_s / pace.prompts_s)
        return step.plan(
            relegate=tuple(late.tolist()),
            restore=self._restore(view, step, limit, behind, pace, now) if self.options.order else (),
            first_token_s=first_token_s,
            notes={
                "limit_ms": 1000 * limit.limit_s,
                "limit_slot": float(limit.slot),
                "decode_ms": 1000 * pace.decode_s,
                "step_ms": 1000 * pace.step_s,
                "kept": float(len(kept.slots)),
                "put_off": float(len(off.slots)),
                "relegated": float(len(behind) + len(late)),
                "aged": float(len(aged)),
                "lost_decodes": float(np.count_nonzero(limit.lost)),
            },
        )

    # ---- what there is to do -------------------------------------------------------------------------------------

    def _look(self, view: EngineView) -> Deadlines:
        """Deadlines and queue brought up to date; work only for what is new since the last step."""
        slots = len(view.columns.known_tokens)
        if self._deadlines is None or len(self._deadlines.tpot_s) != slots:
            self._deadlines = Deadlines(slots)
            self._taken_back_s = np.full(slots, -_INF)
            self._deadlines.look_at(view, view.running)
            self._arrivals = -1
        if view.arrivals != self._arrivals:
            self._arrivals = view.arrivals
            self._deadlines.look_at(view, view.waiting)
            self._queue = view.waiting
            if self.options.order:
                self._queue = view.waiting[self._deadlines.prefill_due_s[view.waiting].argsort(kind="stable")]
        elif len(self._queue) != len(view.waiting):
            waits = np.zeros(slots, np.bool_)
            waits[view.waiting] = True
            self._queue = self._queue[waits[self._queue]]
        return self._deadlines

    def _predict(self, view: EngineView, step: Step, begun: I4, queue: I4) -> tuple[Prompts, tuple[float, DecodeLoad]]:
        """What each prompt would add to a step, were its whole rest computed in it; the duration of a step with one
        decode; and the decode step with everyone started. One call of the model for all of them."""
        c, deadlines, f = view.columns, self._deadlines, step.features
        assert deadlines is not None
        slots = np.concatenate([begun, queue])
        context = np.concatenate([c.computed_tokens[begun], c.cached_tokens[queue]])
        left = c.known_tokens[slots] - context
        started = step.prompts
        sequences = float(f.sequences + len(started))
        kv_tokens = float(f.decode_kv_tokens + int(c.known_tokens[started].sum()))
        q = left.astype(np.float64)
        n = len(q)
        tokens = np.concatenate([[1.0, sequences, sequences + 1.0, sequences, f.tokens], f.tokens + q])
        rows = np.concatenate(
            [[1.0, sequences, sequences + 1.0, sequences, f.sequences], np.full(n, f.sequences + 1.0)]
        )
        kv = np.full(n + 5, float(f.decode_kv_tokens))
        kv[:4] = (1.0, kv_tokens, kv_tokens, kv_tokens + _KV_PROBE_TOKENS)
        attention = np.zeros(n + 5)
        attention[5:] = q * (context + 0.5 * q)
        prefills = np.zeros(n + 5)
        prefills[5:] = 1.0
        s = view.model.mean_s(tokens, rows, prefills, attention, kv)
        single_s, all_s, one_more_s, longer_s, decode_s = s[:5].tolist()
        load = DecodeLoad(all_s, one_more_s - all_s, (longer_s - all_s) / _KV_PROBE_TOKENS)
        prompts = Prompts(
            slots, context, left, np.arange(n) < len(begun), s[5:] - decode_s, deadlines.prefill_due_s[slots]
        )
        return prompts, (single_s, load)

    def _pace(self, view: EngineView, step: Step, limit: StepLimit, mean_s: float, upper_s: float) -> Pace:
        o = self.options
        if not o.limit:
            full = StepFeatures(
                max(step.tokens, 1), step.features.sequences + 1, 1, 0.0, step.features.decode_kv_tokens
            )
            return Pace(mean_s, view.model.predict(full).mean_s, _INF)
        factor = upper_s / mean_s
        allowed_s = limit.limit_s - o.slack_ms / 1000
        return (
            Pace(mean_s, allowed_s / factor, allowed_s) if o.quantile else Pace(mean_s, allowed_s, allowed_s * factor)
        )

    def _order(self, view: EngineView, prompts: Prompts, pace: Pace, now: float) -> tuple[Prompts, Prompts, I4]:
        """Those to serve, in order; those to put off; slots that are late whatever is done."""
        c = view.columns
        if not self.options.order:
            return prompts, prompts[:0], prompts.slots[:0]
        soonest_s = now + pace.decode_s + prompts.work_s
        doomed = soonest_s > prompts.due_s
        late = prompts.slots[doomed]
        if len(late):
            prompts = prompts[~doomed]
        priority = c.priority[prompts.slots]
        assert self._deadlines is not None
        order, ranked = by_deadline(prompts.due_s, self._deadlines.tpot_s[prompts.slots], priority)
        prompts = prompts[order]
        allowed_s = (prompts.due_s - now - pace.decode_s) * (pace.prompts_s / pace.step_s)
        off = put_off(prompts.work_s, allowed_s, c.priority[prompts.slots] if ranked else None)
        if not off.any():
            return prompts, prompts[:0], late
        return prompts[~off], prompts[off], late

    def _restore(
        self, view: EngineView, step: Step, limit: StepLimit, behind: I4, pace: Pace, now: float
    ) -> tuple[int, ...]:
        """Relegated slots whose promise can be kept after all: prompts that the prediction wronged, and resumed
        requests that decode in time."""
        c, deadlines = view.columns, self._deadlines
        assert deadlines is not None
        back: list[int] = []
        again = c.relegated[step.decodes] & ~limit.lost & (c.generated_tokens[step.decodes] > 0)
        if again.any():
            back += step.decodes[again].tolist()
        hopeful = behind[deadlines.prefill_due_s[behind] > now + pace.decode_s] if len(behind) else behind
        if len(hopeful):
            context = np.where(c.computed_tokens[hopeful] > 0, c.computed_tokens[hopeful], c.cached_tokens[hopeful])
            q = (c.known_tokens[hopeful] - context).astype(np.float64)
            f = step.features
            kv = np.full(len(q), float(f.decode_kv_tokens))
            one = np.ones(len(q))
            work_s = view.model.mean_s(q, one, one, q * (context + 0.5 * q), kv)
            back += hopeful[now + _RESTORE_MARGIN * work_s + pace.decode_s < deadlines.prefill_due_s[hopeful]].tolist()
        return tuple(slot for slot in back if slot not in step.preempted)

    # ---- who gets it ---------------------------------------------------------------------------------------------

    def _serve(self, fill: Fill, step: Step, prompts: Prompts, newcomers: bool) -> None:
        assert self._deadlines is not None
        tpot_s = self._deadlines.tpot_s
        rows = zip(*(a.tolist() for a in (prompts.slots, prompts.context, prompts.left, prompts.begun)), strict=True)
        for slot, context, left, begun in rows:
            if not fill.open:
                return
            if begun:
                fill.go_on(slot, context, left)
            elif newcomers:
                reason = fill.start(slot, context, left, float(tpot_s[slot]))
                if reason is not Reason.NONE:
                    step.reasons[slot] = reason

    def _serve_behind(self, fill: Fill, step: Step, view: EngineView, slots: I4, newcomers: bool) -> None:
        """What is left of the step to those who are relegated, the oldest first."""
        c = view.columns
        begun = set(step.prompts)
        for slot in slots[c.arrival_s[slots].argsort(kind="stable")].tolist():
            if not fill.open:
                return
            if step.reasons[slot] in (Reason.AGED, Reason.PREEMPTED):
                continue
            if slot in begun:
                context = int(c.computed_tokens[slot])
                if fill.go_on(slot, context, int(c.known_tokens[slot]) - context):
                    step.reasons[slot] = Reason.LEFTOVER
            elif newcomers:
                if step.seats < 1:
                    continue
                context = int(c.cached_tokens[slot])
                reason = fill.start(slot, context, int(c.known_tokens[slot]) - context, _INF)
                step.reasons[slot] = Reason.LEFTOVER if reason is Reason.NONE else reason

    def _share(self, fill: Fill, step: Step, view: EngineView, aged: I4, pace: Pace) -> bool:
        """The oldest relegated request computes from what its kind is owed. False if it is to start and cannot although
        much is owed: then no newcomer may take the place that it waits for."""
        c = view.columns
        self._owed_s = min(self._owed_s + self.options.share * pace.prompts_s, pace.prompts_s)
        slot = int(aged[c.arrival_s[aged].argmin()])
        begun = slot in step.prompts
        context = int(c.computed_tokens[slot] if begun else c.cached_tokens[slot])
        left = int(c.known_tokens[slot]) - context
        before = step.features
        factor = pace.budget_s / pace.step_s if pace.budget_s < _INF else 1.0
        budget_s = (pace.decode_s + self._owed_s) * factor if pace.budget_s < _INF else _INF
        if begun:
            got = fill.go_on(slot, context, left, budget_s) > 0
        else:
            reason = fill.start(slot, context, left, _INF, budget_s)
            got = reason is Reason.NONE
            if not got and reason is not Reason.WAIT_TIME:
                step.reasons[slot] = reason
                return self._owed_s < pace.prompts_s
        if got:
            step.reasons[slot] = Reason.AGED
            cost_s = view.model.predict(step.features).mean_s - view.model.predict(before).mean_s
            self._owed_s = max(self._owed_s - cost_s, 0.0)
        return True

    def _take_back(self, fill: Fill, step: Step, view: EngineView, kept: Prompts, now: float) -> None:
        """If the first of those to serve cannot start for lack of KV or seats, a relegated prompt that has begun gives
        way: the newest, not twice within a while, and only one a step."""
        first = next((i for i, begun in enumerate(kept.begun.tolist()) if not begun), None)
        if first is None or step.reasons[kept.slots[first]] not in (Reason.WAIT_BLOCKS, Reason.WAIT_SEATS):
            return
        c = view.columns
        candidates = [
            slot
            for slot in step.prompts
            if c.relegated[slot]
            and c.generated_tokens[slot] == 0
            and step.reasons[slot] == Reason.RELEGATED
            and now - self._taken_back_s[slot] > _TAKE_BACK_PAUSE_S
        ]
        if not candidates:
            return
        victim = max(candidates, key=lambda slot: float(c.arrival_s[slot]))
        step.preempt(victim)
        self._taken_back_s[victim] = now
        self._serve(fill, step, kept[first : first + 1], True)

    def _force(self, step: Step, order: list[int]) -> None:
        """Nothing fits the limit, or KV is full of prompts that have begun: the first that can run gets a small chunk,
        and the last give way until one can."""
        crumb = max(int(self.options.crumb), 1)
        begun = set(step.prompts)
        for slot in order:
            if slot in begun:
                step.extend(slot, crumb)
            elif step.admissible(slot) is Reason.NONE and not step.preempted:
                step.admit(slot, crumb)
            if not step.empty:
                return
        last_first = [slot for slot in reversed(order) if slot in begun]
        while step.empty and len(step.prompts) > 1:
            step.preempt(last_first.pop(0))
            step.extend(last_first[-1], crumb)
