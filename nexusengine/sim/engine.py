"""One simulated engine: the loop of core.EngineCore without tokens and tensors, on the same policy and KV objects.

A step is begun with `begin`, which plans and says when the step ends, and ended with `advance`. While nothing waits and
every running request decodes, all steps until the first one ends are alike; they are begun as one run and taken apart
again where something interrupts. tests/sim compares plan by plan with EngineCore.
"""

from __future__ import annotations

import time
from collections import OrderedDict
from collections.abc import Callable
from dataclasses import dataclass

import msgspec
import numpy as np

from nexusengine.arrays import F8, I4
from nexusengine.core.engine_core import COLD_AFTER_S
from nexusengine.errors import InternalError
from nexusengine.kv.manager import KVManager
from nexusengine.perf.features import StepFeatures
from nexusengine.perf.model import PerformanceModel
from nexusengine.profiles.base import DeviceProfile
from nexusengine.scheduler.lens.deadlines import token_due_s
from nexusengine.scheduler.load import worker_load
from nexusengine.scheduler.plan import SchedulerPolicy, StepPlan
from nexusengine.scheduler.stats import CoreStats
from nexusengine.scheduler.validate import plan_problem
from nexusengine.scheduler.view import EngineView, RequestColumns
from nexusengine.sim.job import Job
from nexusengine.wire import WorkerLoad

_HITS_LOOKED_UP = 32
_BLOCKS_LOOKED_UP = 2048
_LONGEST_RUN_STEPS = 1024
_OBSERVED_OF_A_RUN = 8


@dataclass(frozen=True, slots=True)
class EngineSettings:
    """As config.EngineConfig. kv_tokens: capacity; None: the profile's. scheduler_cost_s: added to every step; None: as
    long as planning took on this machine. noise: whether steps scatter as they were measured to. runs: begin like
    decode steps at once. answer_delay_s: how much later than the engine a client has a token, for the strict contract.
    """

    max_running: int = 256
    max_waiting: int = 1024
    max_batch_tokens: int = 2048
    block_size: int = 16
    prefix_caching: bool = False
    kv_tokens: int | None = None
    scheduler_cost_s: float | None = 0.0
    noise: bool = True
    runs: bool = True
    answer_delay_s: float = 0.0


@dataclass(slots=True)
class _Live:
    """A job in the engine. names: of the KV blocks of its tokens, as far as they are known."""

    job: Job
    names: list[bytes]
    preemptions: int = 0
    scheduled_s: float = np.nan
    cached_tokens: int = 0
    ever_relegated: bool = False


@dataclass(frozen=True, slots=True)
class Ended:
    """A job that left the engine. scheduled_s, first_token_s: NaN if it did not get there. strict: every token came in
    time (see slo). refused: by the policy, because the queue was full, or because it can never fit."""

    job: Job
    ended_s: float
    first_token_s: float = np.nan
    scheduled_s: float = np.nan
    output_tokens: int = 0
    cached_tokens: int = 0
    strict: bool = False
    preemptions: int = 0
    relegated: bool = False
    refused: bool = False


@dataclass(slots=True)
class _Run:
    """Steps begun at once: all alike but for growing contexts. done: how many have been applied."""

    slots: I4
    counts: I4
    starts: I4
    ends_s: F8
    took_s: F8
    began_s: float
    predicted_s: float
    upper_s: float
    done: int = 0

    @property
    def step_began_s(self) -> float:
        """When the step under way began."""
        return float(self.ends_s[self.done - 1]) if self.done else self.began_s


class SimEngine:
    """rng gives the noise of steps; slowdown can be set to make the device slower than its profile."""

    def __init__(
        self,
        profile: DeviceProfile,
        policy: SchedulerPolicy,
        model: PerformanceModel,
        settings: EngineSettings,
        *,
        max_model_len: int,
        rng: np.random.Generator,
        on_plan: Callable[[EngineView, StepPlan], None] | None = None,
    ) -> None:
        self.profile, self.policy, self.model, self.settings = profile, policy, model, settings
        self.slowdown = 1.0
        self.covers = 0
        self.first_tokens: list[tuple[Job, float, int]] = []  # when, and prompt tokens found in the prefix cache
        self.ended: list[Ended] = []
        self.planning_s: list[float] = []
        self.stats = CoreStats()
        self.kv_peak_blocks = 0
        self._rng, self._on_plan = rng, on_plan
        size = settings.block_size
        slots = settings.max_running + settings.max_waiting
        blocks = (settings.kv_tokens or profile.kv_capacity_tokens) // size
        self.max_model_len = min(max_model_len, blocks * size)
        self.kv = KVManager(
            blocks + 1, size, slots, -(-self.max_model_len // size), prefix_caching=settings.prefix_caching
        )
        self.stats.kv_total_blocks = self.kv.total_blocks
        self._c = RequestColumns.empty(slots)
        self._ends_at = np.zeros(slots, np.int32)
        self._strict = np.ones(slots, np.bool_)
        self._free_slots = list(range(slots - 1, -1, -1))
        self._live: dict[int, _Live] = {}
        self._running: dict[int, None] = {}
        self._waiting: OrderedDict[int, None] = OrderedDict()
        self._running_slots: I4 | None = np.zeros(0, np.int32)
        self._waiting_slots: I4 | None = np.zeros(0, np.int32)
        self._arrivals = 0
        self._output_tokens_ended = 0
        self._run: _Run | None = None
        self._aborted: set[int] = set()
        self._every_step = not settings.runs or bool(getattr(policy, "plans_every_step", False))
        self._idle_since_s = self._stepped_s = 0.0

    # ---- jobs ----------------------------------------------------------------------------------------------------

    @property
    def busy(self) -> bool:
        """A step is under way."""
        return self._run is not None

    @property
    def has_work(self) -> bool:
        return bool(self._live)

    @property
    def running(self) -> int:
        return len(self._running)

    @property
    def waiting(self) -> int:
        return len(self._waiting)

    def add(self, job: Job, now: float) -> None:
        """A job arrives; call `advance(now)` before. One that finds the queue full, or can never fit, ends refused."""
        request = job.request
        room = self.max_model_len - job.prompt_tokens
        max_tokens = request.sampling.max_tokens or room
        full = len(self._waiting) >= self.settings.max_waiting or not self._free_slots
        if full or room < max(max_tokens, 1):
            self.ended.append(Ended(job, now, refused=True))
            return
        slot, c = self._free_slots.pop(), self._c
        c.arrival_s[slot] = request.arrival_s
        c.prompt_tokens[slot] = c.known_tokens[slot] = job.prompt_tokens
        c.computed_tokens[slot] = c.generated_tokens[slot] = c.blocks[slot] = 0
        c.cached_tokens[slot] = c.cached_free_blocks[slot] = 0
        c.max_tokens[slot] = max_tokens
        c.ttft_s[slot] = request.slo.ttft_s if request.slo else np.nan
        c.tpot_s[slot] = request.slo.tpot_s if request.slo else np.nan
        c.first_token_s[slot] = c.last_token_s[slot] = np.nan
        c.priority[slot] = request.priority
        c.relegated[slot] = False
        self._ends_at[slot] = min(job.output_tokens, max_tokens)
        self._strict[slot] = True
        self._live[slot] = _Live(job, job.block_names(self.settings.block_size) if self.kv.prefix_caching else [])
        self._waiting[slot] = None
        self._waiting_slots = None
        self._arrivals += 1
        self.stats.requests += 1
        self.stats.prompt_tokens += job.prompt_tokens

    def abort(self, request_id: str) -> None:
        """End a job of which nobody wants to hear; one in the step under way leaves at that step's end."""
        for slot, live in self._live.items():
            if live.job.request.request_id == request_id:
                if self._run is not None and slot in self._run.slots:
                    self._cut_run()
                    self._aborted.add(slot)
                else:
                    self._leave(slot)
                return

    # ---- steps ---------------------------------------------------------------------------------------------------

    def begin(self, now: float) -> float | None:
        """Plan and begin the next step or run; the instant at which it ends, None if there is nothing to do. As in
        EngineCore, a plan of which no row finds blocks is made anew: with fresh estimates, then with fewer running."""
        if self._run is not None:
            raise InternalError("a step is under way")
        attempt = 0
        while self._live:
            plan = self._plan(now, fresh=attempt > 0)
            slots, counts = self._place(plan, now)
            if len(slots):
                self.kv_peak_blocks = max(self.kv_peak_blocks, self.kv.used_blocks)
                self._run = self._begin_run(slots, counts, plan, now)
                return float(self._run.ends_s[-1])
            if not self._live:
                break
            if attempt and len(self._running) <= 1:
                raise InternalError(
                    f"policy {self.policy.name!r} plans nothing that can run, with {len(self._running)} jobs running, "
                    f"{len(self._waiting)} waiting and {self.kv.free_blocks} free blocks"
                )
            if attempt:
                self._preempt(next(reversed(self._running)))
            attempt += 1
        self._idle_since_s = now
        return None

    def advance(self, now: float) -> None:
        """Apply every step of the run that has ended by `now`."""
        run = self._run
        if run is None:
            return
        ended = int(np.searchsorted(run.ends_s, now, side="right"))
        if ended > run.done:
            self._apply(run, ended)
        if ended == len(run.ends_s):
            self._run = None
            self._idle_since_s = float(run.ends_s[-1])
            for slot in self._aborted & self._live.keys():
                self._leave(slot)
            self._aborted.clear()

    def interrupt(self) -> float | None:
        """Something came: nothing of the run is certain but the step under way. When that one ends; None if idle."""
        self._cut_run()
        return None if self._run is None else float(self._run.ends_s[-1])

    def _cut_run(self) -> None:
        run = self._run
        if run is not None and len(run.ends_s) > run.done + 1:
            run.ends_s, run.took_s = run.ends_s[: run.done + 1], run.took_s[: run.done + 1]

    def _plan(self, now: float, *, fresh: bool) -> StepPlan:
        self._look_up_hits(everything=fresh)
        view = self.view(now)
        began_s = time.perf_counter()
        plan = self.policy.plan(view, now)
        self.planning_s.append(time.perf_counter() - began_s)
        problem = plan_problem(plan, view)
        if problem is not None:
            raise InternalError(f"the plan of policy {self.policy.name!r} is invalid: {problem}")
        if self._on_plan is not None:
            self._on_plan(view, plan)
        for slot in plan.preempt:
            self._preempt(slot)
        for slot in plan.relegate:
            self._c.relegated[slot] = self._live[slot].ever_relegated = True
        self._c.relegated[list(plan.restore)] = False
        for slot in plan.refuse:
            self._end(slot, now, refused=True)
        return plan

    def _place(self, plan: StepPlan, now: float) -> tuple[I4, I4]:
        """As EngineCore._place: KV blocks for the rows; a row without blocks is left out."""
        c, size = self._c, self.kv.block_size
        slots, counts = plan.slots.copy(), plan.counts.copy()
        short = np.nonzero(c.computed_tokens[slots] + counts > c.blocks[slots] * size)[0]
        keep: np.ndarray | None = None
        for i in short.tolist():
            slot, count = int(slots[i]), int(counts[i])
            newcomer = slot in self._waiting
            if newcomer:
                live = self._live[slot]
                known = int(c.known_tokens[slot])
                cached = self.kv.admit(slot, live.names, known - 1)
                c.computed_tokens[slot] = cached
                counts[i] = count = min(count, known - cached)
            if not self.kv.grow(slot, int(c.computed_tokens[slot]) + count):
                self.stats.plan_shortfalls += 1
                keep = np.ones(len(slots), np.bool_) if keep is None else keep
                keep[i] = False
                if newcomer:
                    self.kv.release(slot)
                    c.computed_tokens[slot] = 0
                continue
            c.blocks[slot] = self.kv.blocks_of(slot)
            if newcomer:
                del self._waiting[slot]
                self._running[slot] = None
                self._running_slots = self._waiting_slots = None
                if np.isnan(live.scheduled_s):
                    live.scheduled_s, live.cached_tokens = now, cached
                self.stats.cached_tokens += cached
        return (slots, counts) if keep is None else (slots[keep], counts[keep])

    def _begin_run(self, slots: I4, counts: I4, plan: StepPlan, now: float) -> _Run:
        s = self.settings
        starts = self._c.computed_tokens[slots]
        steps = 1
        alone = not self._waiting and len(slots) == len(self._running)
        if alone and not self._every_step and counts.max() == 1:
            steps = self._alike(slots, starts)
        if steps > 1:
            took_s = self.profile.decode_run_s(starts, steps)
        else:
            took_s = np.array([self.profile.step_s(counts, starts)])
        if s.noise:
            took_s = took_s * self.profile.noise(self._rng.random(steps), bool(counts.max() > 1))
        took_s *= self.slowdown
        cost_s = self.planning_s[-1] if s.scheduler_cost_s is None else s.scheduler_cost_s
        ends_s = now + np.cumsum(took_s + cost_s)
        return _Run(slots, counts, starts, ends_s, took_s, now, plan.predicted_s, plan.upper_s)

    def _alike(self, slots: I4, starts: I4) -> int:
        """How many decode steps pass before a row ends, blocks run out, or a row has to be planned anew."""
        if (self._c.generated_tokens[slots] == 0).any() or (self._c.known_tokens[slots] - starts != 1).any():
            return 1
        steps = min(int((self._ends_at[slots] - self._c.generated_tokens[slots]).min()), _LONGEST_RUN_STEPS)
        size = self.kv.block_size
        missing = -(-(starts + steps) // size) - self._c.blocks[slots]
        return steps if int(np.maximum(missing, 0).sum()) <= self.kv.free_blocks else 1

    def _apply(self, run: _Run, until: int) -> None:
        """Steps run.done .. until of the run have ended. Only its last step can end a row."""
        c, size, slots = self._c, self.kv.block_size, run.slots
        steps = until - run.done
        if run.done or steps > 1:  # only the first step's blocks were found when it was planned
            all_ends = run.starts + until
            for i in np.nonzero(all_ends > c.blocks[slots] * size)[0].tolist():
                slot = int(slots[i])
                if not self.kv.grow(slot, int(all_ends[i])):
                    raise InternalError("a run of decode steps ran out of KV blocks")
                c.blocks[slot] = self.kv.blocks_of(slot)
            self.kv_peak_blocks = max(self.kv_peak_blocks, self.kv.used_blocks)
        now = float(run.ends_s[until - 1])
        starts = run.starts + run.done
        self.stats.steps += steps
        if run.done == 0:
            self.stats.learn_prediction(run.predicted_s, run.upper_s, float(run.took_s[0]))
        self._observe(run, until)
        ends = starts + (run.counts if steps == 1 else steps)
        c.computed_tokens[slots] = ends
        if self.kv.prefix_caching:
            for i in np.nonzero(starts // size != ends // size)[0].tolist():
                self.kv.commit(int(slots[i]), self._live[int(slots[i])].names, int(ends[i]))
        sampled = slots if steps > 1 else slots[ends == c.known_tokens[slots]]
        self._sampled(sampled, run.ends_s[run.done : until], now)
        self._stepped_s = now
        self.stats.computed_tokens += int(run.counts.sum()) * steps
        self.stats.generated_tokens += len(sampled) * steps
        self.stats.device_s += float(run.took_s[run.done : until].sum())
        run.done = until

    def _sampled(self, slots: I4, at_s: F8, now: float) -> None:
        """Each of `slots` got a token at each instant of `at_s`."""
        c, steps = self._c, len(at_s)
        newcomers = slots[np.isnan(c.first_token_s[slots])]
        if len(newcomers):
            c.first_token_s[newcomers] = at_s[0]
            live = [self._live[s] for s in newcomers.tolist()]
            self.first_tokens += [(one.job, float(at_s[0]), one.cached_tokens) for one in live]
        due_s = token_due_s(c.arrival_s[slots], c.ttft_s[slots], c.tpot_s[slots], c.generated_tokens[slots])
        due_s -= self.settings.answer_delay_s
        if steps == 1:
            self._strict[slots] &= ~(at_s[0] > due_s)
        else:
            late_s = at_s[None, :] - due_s[:, None] - np.arange(steps) * c.tpot_s[slots][:, None]
            self._strict[slots] &= ~(late_s > 0.0).any(axis=1)
        c.known_tokens[slots] += steps
        c.generated_tokens[slots] += steps
        c.last_token_s[slots] = now
        for slot in slots[c.generated_tokens[slots] >= self._ends_at[slots]].tolist():
            self._end(slot, now)

    def _observe(self, run: _Run, until: int) -> None:
        features = StepFeatures.of(run.counts, run.starts + run.done)
        for i in range(run.done, until, _OBSERVED_OF_A_RUN):
            cold = i == 0 and run.began_s - self._stepped_s > COLD_AFTER_S
            (self.model.observe_cold if cold else self.model.observe)(features, float(run.took_s[i]))
            grown = features.decode_kv_tokens + features.sequences * _OBSERVED_OF_A_RUN
            features = StepFeatures(
                features.tokens, features.sequences, features.prefills, features.prefill_attention, grown
            )

    # ---- transitions ---------------------------------------------------------------------------------------------

    def _preempt(self, slot: int) -> None:
        del self._running[slot]
        self.kv.release(slot)
        self._c.computed_tokens[slot] = self._c.blocks[slot] = 0
        self._waiting[slot] = None
        self._waiting.move_to_end(slot, last=False)
        self._running_slots = self._waiting_slots = None
        self._arrivals += 1
        self._live[slot].preemptions += 1
        self.stats.preemptions += 1

    def _end(self, slot: int, now: float, *, refused: bool = False) -> None:
        live, c = self._live[slot], self._c
        self._output_tokens_ended += int(c.generated_tokens[slot])
        if slot not in self._aborted:
            self.ended.append(
                Ended(
                    live.job,
                    now,
                    first_token_s=float(c.first_token_s[slot]),
                    scheduled_s=live.scheduled_s,
                    output_tokens=int(c.generated_tokens[slot]),
                    cached_tokens=live.cached_tokens,
                    strict=bool(self._strict[slot]) and not refused,
                    preemptions=live.preemptions,
                    relegated=live.ever_relegated,
                    refused=refused,
                )
            )
        self._leave(slot)

    def _leave(self, slot: int) -> None:
        self._running.pop(slot, None)
        self._waiting.pop(slot, None)
        self._running_slots = self._waiting_slots = None
        self.kv.release(slot)
        self._c.blocks[slot] = self._c.computed_tokens[slot] = 0
        del self._live[slot]
        self._free_slots.append(slot)

    # ---- what others see -----------------------------------------------------------------------------------------

    def view(self, now: float) -> EngineView:
        if self._running_slots is None:
            self._running_slots = np.fromiter(self._running, np.int32, len(self._running))
        if self._waiting_slots is None:
            self._waiting_slots = np.fromiter(self._waiting, np.int32, len(self._waiting))
        return EngineView(
            columns=self._c,
            running=self._running_slots,
            waiting=self._waiting_slots,
            free_blocks=self.kv.free_blocks,
            total_blocks=self.kv.total_blocks,
            block_size=self.kv.block_size,
            max_batch_tokens=self.settings.max_batch_tokens,
            max_running=self.settings.max_running,
            model=self.model,
            arrivals=self._arrivals,
            idle_s=now - self._idle_since_s,
        )

    def load(self, now: float) -> WorkerLoad:
        """As EngineCore.load; call `advance(now)` before."""
        view = self.view(now)
        stats = self.stats
        stats.running, stats.waiting, stats.kv_used_blocks = len(self._running), len(self._waiting), self.kv.used_blocks
        stats.kv_evictions = self.kv.evictions
        load = worker_load(
            self._c,
            view.running,
            view.waiting,
            covers=self.covers,
            stats=stats,
            perf=self.model.snapshot(),
            mean_output_tokens=self._output_tokens_ended / max(stats.requests - len(self._live), 1),
        )
        run = self._run
        if run is None:
            return load
        running_s = max(now - run.step_began_s, 0.0)
        return msgspec.structs.replace(load, step=stats.steps + 1, step_running_s=running_s, step_upper_s=run.upper_s)

    def _look_up_hits(self, *, everything: bool) -> None:
        if not self.kv.prefix_caching or len(self._running) >= self.settings.max_running:
            return
        blocks = 0
        for n, slot in enumerate(self._waiting):
            if not everything and (n == _HITS_LOOKED_UP or blocks > _BLOCKS_LOOKED_UP):
                return
            hit = self.kv.lookup(self._live[slot].names, int(self._c.known_tokens[slot]) - 1)
            blocks += len(hit.blocks)
            self._c.cached_tokens[slot] = hit.tokens
            self._c.cached_free_blocks[slot] = hit.free_blocks
