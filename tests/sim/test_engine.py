"""The simulated engine plans and computes what EngineCore does, plan by plan."""

from __future__ import annotations

import numpy as np
import pytest

from nexusengine.clock import VirtualClock
from nexusengine.core.engine_core import EngineCore
from nexusengine.execute.base import ExecutorSpec
from nexusengine.execute.batch import StepBatch, StepResult
from nexusengine.perf.registry import make_model
from nexusengine.scheduler.plan import SchedulerPolicy, StepPlan
from nexusengine.scheduler.registry import make_policy
from nexusengine.scheduler.view import EngineView
from nexusengine.sim.engine import EngineSettings, SimEngine
from nexusengine.sim.job import Job, make_job
from nexusengine.types import SLO, EngineRequest, SamplingParams
from tests.sim.fakes import FormulaProfile

MAX_LEN = 512
Plans = list[tuple[float, list[tuple[float, int]], list[float]]]


class Recorder:
    """A policy that remembers what it planned."""

    def __init__(self, policy: SchedulerPolicy, plans: Plans) -> None:
        self.policy, self.plans, self.name, self.traits = policy, plans, policy.name, policy.traits

    def plan(self, view: EngineView, now: float) -> StepPlan:
        plan = self.policy.plan(view, now)
        who = view.columns.arrival_s  # slots may be given out in another order
        rows = sorted(zip(who[plan.slots].tolist(), plan.counts.tolist(), strict=True))
        self.plans.append((round(now, 6), rows, who[list(plan.preempt)].tolist()))
        return plan


class ClockedExecutor:
    """Takes the profile's time on the virtual clock; every token is 1."""

    def __init__(self, profile: FormulaProfile, clock: VirtualClock, num_blocks: int) -> None:
        self.profile, self.clock = profile, clock
        self.spec = ExecutorSpec("fake", "float32", 16, num_blocks, MAX_LEN, 128, 100, "fake", 0, 0)

    def submit(self, batch: StepBatch) -> None:
        self.batch = batch

    def collect(self) -> StepResult:
        took_s = self.profile.step_s(self.batch.counts, self.batch.starts)
        self.clock.advance(took_s)
        return StepResult(np.ones(int(self.batch.sampled.sum()), np.int32), took_s)

    def close(self) -> None: ...


def workload(seed: int, count: int) -> list[Job]:
    rng = np.random.default_rng(seed)
    arrivals = np.cumsum(rng.exponential(0.03, count))
    return [
        make_job(f"r{i}", float(t), int(rng.integers(1, 300)), int(rng.integers(1, 100)), slo=SLO(1.0, 0.05))
        for i, t in enumerate(arrivals)
    ]


def through_the_core(
    jobs: list[Job], policy: SchedulerPolicy, blocks: int
) -> tuple[Plans, dict[str, tuple[float, float]]]:
    clock = VirtualClock()
    plans: Plans = []
    ends: dict[str, tuple[float, float]] = {}
    profile = FormulaProfile()
    core = EngineCore(
        ClockedExecutor(profile, clock, blocks + 1),
        Recorder(policy, plans),
        make_model(),
        clock=clock,
        max_running=24,
        max_waiting=200,
        prefix_caching=False,
        check_every_step=True,
    )
    pending = list(jobs)
    while pending or core.has_work:
        if not core.has_work and pending[0].request.arrival_s > clock.now():
            clock.advance(pending[0].request.arrival_s - clock.now())
        while pending and pending[0].request.arrival_s <= clock.now():
            job = pending.pop(0)
            sampling = SamplingParams(max_tokens=job.output_tokens, ignore_eos=True, seed=0)
            prompt = [1] * job.prompt_tokens
            request = EngineRequest(
                job.request.request_id, prompt, sampling, job.request.arrival_s, slo=job.request.slo
            )
            core.add(request)
        for delta in core.step():
            if delta.finish_reason is not None:
                assert delta.timings is not None
                assert delta.timings.first_token_s is not None
                assert delta.timings.finished_s is not None
                ends[delta.request_id] = (delta.timings.first_token_s, delta.timings.finished_s)
    return plans, ends


def through_the_simulator(
    jobs: list[Job], policy: SchedulerPolicy, blocks: int
) -> tuple[Plans, dict[str, tuple[float, float]]]:
    plans: Plans = []
    engine = SimEngine(
        FormulaProfile(),
        Recorder(policy, plans),
        make_model(),
        EngineSettings(max_running=24, max_waiting=200, max_batch_tokens=128, kv_tokens=blocks * 16, noise=False),
        max_model_len=MAX_LEN,
        rng=np.random.default_rng(0),
    )
    now, until_s, pending = 0.0, None, list(jobs)
    while pending or engine.has_work:
        next_s = pending[0].request.arrival_s if pending else float("inf")
        if until_s is not None and until_s < next_s:
            now = until_s
            engine.advance(now)
            until_s = engine.begin(now)
        else:
            now = next_s
            engine.advance(now)
            engine.add(pending.pop(0), now)
            until_s = engine.interrupt()
            if until_s is None:
                until_s = engine.begin(now)
    engine.kv.check()
    return plans, {e.job.request.request_id: (e.first_token_s, e.ended_s) for e in engine.ended}


@pytest.mark.parametrize(
    "policy",
    [
        "fcfs",
        "fcfs:budget=64",
        "sarathi:budget=48",
        "prefill-first",
        "edf",
        "edf:relegate=1",
        "srpt",
        "paper-lens",
        "lens",
        "lens:limit=0,budget=64",
        "lens:order=0",
    ],
)
@pytest.mark.parametrize("blocks", [40, 1000])
@pytest.mark.parametrize("seed", [1, 2, 3])
def test_every_request_ends_when_it_ends_in_the_real_core(policy: str, blocks: int, seed: int) -> None:
    jobs = workload(seed, 60)
    real_plans, real = through_the_core(jobs, make_policy(policy), blocks)
    sim_plans, simulated = through_the_simulator(jobs, make_policy(policy), blocks)
    assert simulated.keys() == real.keys()
    for name, instants in real.items():
        assert simulated[name] == pytest.approx(instants, abs=1e-9), name
    assert blocks > 40 or any(preempted for _, _, preempted in real_plans)
    planned = {at_s: (rows, preempted) for at_s, rows, preempted in real_plans}
    for at_s, rows, preempted in sim_plans:  # fewer plans: like steps are begun as one run
        assert planned[at_s] == (rows, preempted)
