"""Every policy under random workloads in the simulated engine: valid plans, no starvation, no leak, no empty step."""

from __future__ import annotations

from collections import Counter, defaultdict
from dataclasses import dataclass, field

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from nexusengine.perf.online import OnlineModel
from nexusengine.scheduler.plan import Reason, SchedulerPolicy, StepPlan
from nexusengine.scheduler.registry import POLICIES, make_policy
from nexusengine.scheduler.validate import plan_problem
from nexusengine.scheduler.view import EngineView
from nexusengine.sim.alone import serve_alone
from nexusengine.sim.engine import EngineSettings, SimEngine
from nexusengine.sim.job import Job, make_job
from nexusengine.types import SLO
from tests.sim.fakes import FormulaProfile

MAX_LEN = 512
BLOCK = 16
LENS = ("lens", "lens:order=0", "lens:limit=0,budget=64", "lens:quantile=1,coalescing=0", "lens:shed_s=0")


@dataclass
class Watched:
    """A policy whose every plan is checked. Events by arrival instant, which names a request."""

    policy: SchedulerPolicy
    plans_every_step: bool = True
    plans: int = 0
    admitted: dict[float, list[int]] = field(default_factory=lambda: defaultdict(list))
    preempted: dict[float, list[int]] = field(default_factory=lambda: defaultdict(list))
    computed: Counter[float] = field(default_factory=Counter)

    def __post_init__(self) -> None:
        self.name, self.traits = self.policy.name, self.policy.traits

    def plan(self, view: EngineView, now: float) -> StepPlan:
        plan = self.policy.plan(view, now)
        self.plans += 1
        c = view.columns
        assert plan_problem(plan, view) is None
        assert len(plan.slots) or plan.refuse, "an empty step while there is work"
        blocks = -(-(_starts(view, plan) + plan.counts) // view.block_size) - c.blocks[plan.slots]
        freed = int(c.blocks[list(plan.preempt)].sum())
        assert np.maximum(blocks, 0).sum() <= view.free_blocks + freed, "more KV blocks than there are"
        reasons = [Reason(int(r)) for r in np.unique(plan.reasons[np.concatenate([view.running, view.waiting])])]
        assert Reason.NONE not in reasons, "a request without a reason"
        for slot in plan.preempt:
            self.preempted[float(c.arrival_s[slot])].append(self.plans)
        waiting = set(view.waiting.tolist())
        for slot in plan.slots.tolist():
            self.computed[float(c.arrival_s[slot])] += 1
            if slot in waiting:
                self.admitted[float(c.arrival_s[slot])].append(self.plans)
        return plan


def _starts(view: EngineView, plan: StepPlan) -> np.ndarray:
    c = view.columns
    return np.where(c.blocks[plan.slots] > 0, c.computed_tokens[plan.slots], c.cached_tokens[plan.slots])


@dataclass(frozen=True)
class Load:
    """gap_s: mean between arrivals; slo: 0 none, 1 tight, 2 usual, 3 loose, of each request."""

    seed: int
    count: int
    gap_s: float
    longest: int
    slos: tuple[int, ...]

    def jobs(self) -> list[Job]:
        rng = np.random.default_rng(self.seed)
        arrivals = np.cumsum(rng.exponential(self.gap_s, self.count))
        jobs = []
        for i, t in enumerate(arrivals.tolist()):
            prompt = int(rng.integers(1, self.longest))
            output = int(rng.integers(1, min(MAX_LEN - prompt, 40) + 1))
            kind = self.slos[i % len(self.slos)]
            slo = (None, SLO(0.01, 0.001), SLO(0.3, 0.02), SLO(5.0, 0.2))[kind]
            job = make_job(f"r{i}", t, prompt, output, slo=slo)
            jobs.append(job)
        return jobs


loads = st.builds(
    Load,
    seed=st.integers(0, 2**32),
    count=st.integers(1, 30),
    gap_s=st.sampled_from([0.0005, 0.01, 0.05]),
    longest=st.sampled_from([8, 120, 400]),
    slos=st.lists(st.integers(0, 3), min_size=1, max_size=4).map(tuple),
)


def serve(watched: Watched, jobs: list[Job], *, blocks: int, seats: int, batch: int = 128) -> SimEngine:
    engine = SimEngine(
        FormulaProfile(),
        watched,
        OnlineModel(),
        EngineSettings(max_running=seats, max_waiting=200, max_batch_tokens=batch, kv_tokens=blocks * BLOCK),
        max_model_len=MAX_LEN,
        rng=np.random.default_rng(0),
    )
    return serve_alone(engine, jobs, most_events=200_000)


@pytest.mark.parametrize("spec", [*(name for name in POLICIES if name != "lens"), *LENS])
@settings(max_examples=12, deadline=None)
@given(load=loads, blocks=st.sampled_from([32, 40, 80, 400]), seats=st.sampled_from([1, 3, 24]))
def test_every_request_ends_and_every_plan_is_valid(spec: str, load: Load, blocks: int, seats: int) -> None:
    watched = Watched(make_policy(spec))
    jobs = load.jobs()
    engine = serve(watched, jobs, blocks=blocks, seats=seats)
    assert len(engine.ended) == len(jobs)
    engine.kv.check()
    assert engine.kv.used_blocks == 0


@pytest.mark.parametrize("spec", LENS)
@settings(max_examples=12, deadline=None)
@given(load=loads, blocks=st.sampled_from([32, 40, 80]), seats=st.sampled_from([3, 24]))
def test_a_request_that_was_preempted_runs_a_while_before_it_is_preempted_again(
    spec: str, load: Load, blocks: int, seats: int
) -> None:
    watched = Watched(make_policy(spec))
    serve(watched, load.jobs(), blocks=blocks, seats=seats)
    for name, preempted in watched.preempted.items():
        admitted = watched.admitted[name]
        for began, ended in zip(admitted[1:], preempted[1:], strict=False):
            assert ended - began >= 8, f"request {name} ran {ended - began} steps between two preemptions"


@settings(max_examples=12, deadline=None)
@given(load=loads, seats=st.sampled_from([3, 24]))
def test_under_lens_no_wait_is_longer_than_its_bound(load: Load, seats: int) -> None:
    """A request is served, or refused once it has waited 3 TTFTs and 60 s: nothing waits much longer for its start."""
    engine = serve(Watched(make_policy("lens")), load.jobs(), blocks=100, seats=seats)
    for end in engine.ended:
        slo = end.job.request.slo
        bound_s = 3 * (slo.ttft_s if slo is not None else 32.0) + 60 + 10
        instant_s = end.ended_s if end.refused else end.first_token_s
        assert instant_s - end.job.request.arrival_s <= bound_s
