"""One simulated engine: the Scheduler that core.EngineCore runs, on a virtual clock, without tokens and tensors.

A step is begun with `begin`, which plans and says when the step ends, and ended with `advance`. While nothing waits and
every running request decodes, all steps until the first one ends are alike; they are begun as one run and taken apart
again where something interrupts. tests/sim compares plan by plan with EngineCore.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass

import msgspec
import numpy as np

from nexusengine.arrays import F8, I4
from nexusengine.errors import InternalError
from nexusengine.kv.manager import KVManager
from nexusengine.perf.features import StepFeatures
from nexusengine.perf.model import PerformanceModel
from nexusengine.profiles.base import DeviceProfile
from nexusengine.scheduler.plan import SchedulerPolicy, StepPlan
from nexusengine.scheduler.request import SchedulerRequest
from nexusengine.scheduler.scheduler import COLD_AFTER_S, Scheduler
from nexusengine.scheduler.view import EngineView
from nexusengine.sim.job import Job
from nexusengine.wire import WorkerLoad

_LONGEST_RUN_STEPS = 1024
_OBSERVED_OF_A_RUN = 8


@dataclass(frozen=True, slots=True)
class EngineSettings:
    """Settings of a simulated engine, as in config.EngineConfig.

    Attributes:
        kv_tokens: capacity; None: the profile's.
        scheduler_cost_s: added to every step; None: as long as planning took on this machine.
        noise: whether steps scatter as they were measured to.
        runs: begin like decode steps at once.
        answer_delay_s: how much later than the engine a client has a token, for the strict contract.
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


@dataclass(slots=True, kw_only=True)
class SimRequest(SchedulerRequest):
    """A job in the engine."""

    job: Job


class _Observed:
    """A policy, and what is noted of its plans: how long each took on this machine."""

    def __init__(self, policy: SchedulerPolicy, on_plan: Callable[[EngineView, StepPlan], None] | None) -> None:
        self.name, self.traits = policy.name, policy.traits
        self.planning_s: list[float] = []
        self._policy, self._on_plan = policy, on_plan

    def plan(self, view: EngineView, now: float) -> StepPlan:
        began_s = time.perf_counter()
        plan = self._policy.plan(view, now)
        self.planning_s.append(time.perf_counter() - began_s)
        if self._on_plan is not None:
            self._on_plan(view, plan)
        return plan


@dataclass(frozen=True, slots=True)
class Ended:
    """A job that left the engine.

    Attributes:
        first_token_s, scheduled_s: timestamps, NaN if it did not get there.
        strict: every token came in time (see slo.due).
        refused: by the policy, because the queue was full, or because it can never fit.
    """

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
        self.last_dispatch_seq = 0
        self.first_tokens: list[tuple[Job, float, int]] = []  # when, and prompt tokens found in the prefix cache
        self.ended: list[Ended] = []
        self.kv_peak_blocks = 0
        size = settings.block_size
        slots = settings.max_running + settings.max_waiting
        blocks = (settings.kv_tokens or profile.identity.kv_capacity_tokens) // size
        self.max_model_len = min(max_model_len, blocks * size)
        self.kv = KVManager(
            blocks + 1, size, slots, -(-self.max_model_len // size), prefix_caching=settings.prefix_caching
        )
        self._observed = _Observed(policy, on_plan)
        self.scheduler: Scheduler[SimRequest] = Scheduler(
            self._observed,
            model,
            self.kv,
            max_running=settings.max_running,
            max_waiting=settings.max_waiting,
            max_batch_tokens=settings.max_batch_tokens,
        )
        self.stats = self.scheduler.stats
        self._rng = rng
        self._ends_at = np.zeros(slots, np.int32)
        self._run: _Run | None = None
        self._aborted: set[int] = set()
        self._every_step = not settings.runs or bool(getattr(policy, "plans_every_step", False))
        self._stepped_s = 0.0

    # ---- jobs ----------------------------------------------------------------------------------------------------

    @property
    def busy(self) -> bool:
        """A step is under way."""
        return self._run is not None

    @property
    def has_work(self) -> bool:
        return bool(self.scheduler.requests)

    @property
    def running(self) -> int:
        return len(self.scheduler.running)

    @property
    def waiting(self) -> int:
        return len(self.scheduler.waiting)

    @property
    def planning_s(self) -> list[float]:
        """Seconds that each plan took on this machine."""
        return self._observed.planning_s

    def add(self, job: Job, now: float) -> None:
        """A job arrives; call `advance(now)` before. One that finds the queue full, or can never fit, ends refused."""
        room = self.max_model_len - job.prompt_tokens
        max_tokens = job.request.sampling.max_tokens or room
        if self.scheduler.room < 1 or room < max(max_tokens, 1):
            self.ended.append(Ended(job, now, refused=True))
            return
        hashes = job.block_names(self.settings.block_size) if self.kv.prefix_caching else []
        request = SimRequest(request=job.request, max_tokens=max_tokens, block_hashes=hashes, job=job)
        self.scheduler.add(request)
        self._ends_at[request.slot] = min(job.output_tokens, max_tokens)

    def abort(self, request_id: str) -> None:
        """End a job of which nobody wants to hear; one in the step under way leaves at that step's end."""
        for slot, request in self.scheduler.requests.items():
            if request.request.request_id == request_id:
                if self._run is not None and slot in self._run.slots:
                    self._cut_run()
                    self._aborted.add(slot)
                else:
                    self._leave(request, output_tokens=0)
                return

    # ---- steps ---------------------------------------------------------------------------------------------------

    def begin(self, now: float) -> float | None:
        """Plan and begin the next step or run; the timestamp at which it ends, None if there is nothing to do."""
        if self._run is not None:
            raise InternalError("a step is under way")
        if not self.scheduler.can_plan:
            return None
        scheduled = self.scheduler.schedule(now)
        for request in scheduled.refused:
            self._note_end(request, now, refused=True)
        if not len(scheduled.slots):
            return None
        self.kv_peak_blocks = max(self.kv_peak_blocks, self.kv.used_blocks)
        self._run = self._begin_run(scheduled.slots, scheduled.counts, scheduled.plan, now)
        return float(self._run.ends_s[-1])

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
            for slot in self._aborted & self.scheduler.requests.keys():
                self._leave(self.scheduler.requests[slot], output_tokens=0)
            self._aborted.clear()

    def interrupt(self) -> float | None:
        """Something came: nothing of the run is certain but the step under way. When that one ends; None if idle."""
        self._cut_run()
        return None if self._run is None else float(self._run.ends_s[-1])

    def _cut_run(self) -> None:
        run = self._run
        if run is not None and len(run.ends_s) > run.done + 1:
            run.ends_s, run.took_s = run.ends_s[: run.done + 1], run.took_s[: run.done + 1]

    def _begin_run(self, slots: I4, counts: I4, plan: StepPlan, now: float) -> _Run:
        s = self.settings
        starts = self.scheduler.columns.computed_tokens[slots]
        steps = 1
        alone = not self.scheduler.waiting and len(slots) == len(self.scheduler.running)
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
        c = self.scheduler.columns
        if (c.generated_tokens[slots] == 0).any() or (c.known_tokens[slots] - starts != 1).any():
            return 1
        steps = min(int((self._ends_at[slots] - c.generated_tokens[slots]).min()), _LONGEST_RUN_STEPS)
        missing = -(-(starts + steps) // self.kv.block_size) - c.blocks[slots]
        return steps if int(np.maximum(missing, 0).sum()) <= self.kv.free_blocks else 1

    def _apply(self, run: _Run, until: int) -> None:
        """Steps run.done .. until of the run have ended. Only its last step can end a row."""
        scheduler, size, slots = self.scheduler, self.kv.block_size, run.slots
        steps = until - run.done
        if run.done or steps > 1:  # only the first step's blocks were found when it was planned
            all_ends = run.starts + until
            for i in np.nonzero(all_ends > scheduler.columns.blocks[slots] * size)[0].tolist():
                if not scheduler.grow(int(slots[i]), int(all_ends[i])):
                    raise InternalError("a run of decode steps ran out of KV blocks")
            self.kv_peak_blocks = max(self.kv_peak_blocks, self.kv.used_blocks)
        self.stats.steps += steps
        if run.done == 0:
            self.stats.learn_prediction(run.predicted_s, run.upper_s, float(run.took_s[0]))
        self._observe(run, until)
        starts = run.starts + run.done
        sampled = scheduler.advance(slots, run.counts, steps)
        ends = scheduler.columns.computed_tokens[slots]
        if self.kv.prefix_caching:
            for i in np.nonzero(starts // size != ends // size)[0].tolist():
                scheduler.commit(scheduler.requests[int(slots[i])], int(ends[i]))
        self._sampled(sampled, run.ends_s[run.done : until])
        self._stepped_s = float(run.ends_s[until - 1])
        self.stats.computed_tokens += int(run.counts.sum()) * steps
        self.stats.generated_tokens += len(sampled) * steps
        self.stats.device_s += float(run.took_s[run.done : until].sum())
        run.done = until

    def _sampled(self, slots: I4, at_s: F8) -> None:
        """Each of `slots` got a token at each timestamp of `at_s`."""
        c, now = self.scheduler.columns, float(at_s[-1])
        first = slots[np.isnan(c.first_token_s[slots])]
        c.first_token_s[first] = at_s[0]
        requests = [self.scheduler.requests[slot] for slot in first.tolist()]
        self.first_tokens += [(one.job, float(at_s[0]), one.cached_tokens) for one in requests]
        c.last_token_s[slots] = now
        before = c.generated_tokens[slots] - len(at_s)
        self.scheduler.judge(slots, before, at_s, margin_s=self.settings.answer_delay_s)
        for slot in slots[c.generated_tokens[slots] >= self._ends_at[slots]].tolist():
            self._end(self.scheduler.requests[slot], now)

    def _observe(self, run: _Run, until: int) -> None:
        features = StepFeatures.of(run.counts, run.starts + run.done)
        for i in range(run.done, until, _OBSERVED_OF_A_RUN):
            cold = i == 0 and run.began_s - self._stepped_s > COLD_AFTER_S
            (self.model.observe_cold if cold else self.model.observe)(features, float(run.took_s[i]))
            grown = features.decode_kv_tokens + features.sequences * _OBSERVED_OF_A_RUN
            features = StepFeatures(
                features.tokens, features.sequences, features.prefills, features.prefill_attention, grown
            )

    # ---- ends ----------------------------------------------------------------------------------------------------

    def _end(self, request: SimRequest, now: float) -> None:
        complete = request.slot not in self._aborted
        if complete:
            self._note_end(request, now)
        output_tokens = int(self.scheduler.columns.generated_tokens[request.slot])
        self._leave(request, output_tokens=output_tokens, complete=complete)

    def _note_end(self, request: SimRequest, now: float, *, refused: bool = False) -> None:
        c, slot = self.scheduler.columns, request.slot
        self.ended.append(
            Ended(
                request.job,
                now,
                first_token_s=float(c.first_token_s[slot]),
                scheduled_s=np.nan if request.scheduled_s is None else request.scheduled_s,
                output_tokens=int(c.generated_tokens[slot]),
                cached_tokens=request.cached_tokens,
                strict=bool(self.scheduler.strict[slot]) and not refused,
                preemptions=request.preemptions,
                relegated=request.ever_relegated,
                refused=refused,
            )
        )

    def _leave(self, request: SimRequest, *, output_tokens: int, complete: bool = False) -> None:
        self.scheduler.finish(request, output_tokens=output_tokens, complete=complete)

    # ---- what others see -----------------------------------------------------------------------------------------

    def load(self, now: float) -> WorkerLoad:
        """As EngineCore.load; call `advance(now)` before."""
        load, run = self.scheduler.load(self.last_dispatch_seq), self._run
        if run is None:
            return load
        running_s = max(now - run.step_began_s, 0.0)
        return msgspec.structs.replace(
            load, step=self.stats.steps + 1, step_running_s=running_s, step_upper_s=run.upper_s
        )
