"""Small clusters for tests: made-up devices, jobs by hand, and a check that nothing is left over."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from typing import Any

import numpy as np

from nexusengine.router.placement.candidates import ServesLate
from nexusengine.router.placement.policy import Decision, PlacementPolicy, PlacementRequest, WorkerView
from nexusengine.router.placement.registry import make_policy as make_router
from nexusengine.scheduler.plan import SchedulerPolicy
from nexusengine.scheduler.registry import make_policy
from nexusengine.sim.cluster import Cluster, LinkSettings, Outcome
from nexusengine.sim.engine import EngineSettings, SimEngine
from nexusengine.sim.faults import parse_fault
from nexusengine.sim.job import Job, make_job
from nexusengine.sim.models import make_sim_model
from nexusengine.types import SLO
from tests.sim.fakes import FormulaProfile

MAX_LEN = 2048
QUIET = EngineSettings(noise=False, max_running=24, max_waiting=200, max_batch_tokens=256)
LINK = LinkSettings(link_delay_s=0.001, snapshot_period_s=0.05)


def make_cluster(
    workers: int = 2,
    *,
    engine: str | SchedulerPolicy = "fcfs",
    router: str | PlacementPolicy = "least-outstanding",
    settings: EngineSettings = QUIET,
    link: LinkSettings = LINK,
    faults: Sequence[str] = (),
    seed: int = 0,
    kv_tokens: int = 20_000,
    perf: str = "online",
    **more: Any,
) -> Cluster:
    def maker(index: int) -> SimEngine:
        profile = FormulaProfile(kv_tokens)
        return SimEngine(
            profile,
            make_policy(engine) if isinstance(engine, str) else engine,
            make_sim_model(perf, profile),
            settings,
            max_model_len=MAX_LEN,
            rng=np.random.default_rng([seed, index]),
        )

    return Cluster(
        [partial(maker, i) for i in range(workers)],
        make_router(router) if isinstance(router, str) else router,
        link,
        np.random.default_rng(seed),
        faults=[parse_fault(text, workers) for text in faults],
        **more,
    )


def make_jobs(count: int, gap_s: float, seed: int = 0, *, prompt: int = 200, output: int = 40) -> list[Job]:
    """Poisson arrivals, lengths around `prompt` and `output`."""
    rng = np.random.default_rng(seed)
    at_s = np.cumsum(rng.exponential(gap_s, count))
    return [
        make_job(
            f"r{i}", float(t), int(rng.integers(1, 2 * prompt)), int(rng.integers(1, 2 * output)), slo=SLO(1, 0.05)
        )
        for i, t in enumerate(at_s)
    ]


def assert_nothing_left(cluster: Cluster, jobs: Sequence[Job], outcomes: Sequence[Outcome]) -> None:
    """Every job has one outcome, and no engine, pool or ledger holds anything any more."""
    assert sorted(o.job.request.request_id for o in outcomes) == sorted(j.request.request_id for j in jobs)
    for outcome in outcomes:
        assert (outcome.error is None) == (outcome.ended is not None and not outcome.ended.refused)
        assert outcome.last_s >= outcome.job.request.arrival_s
    assert len(cluster.core.ledger) == 0
    for worker in cluster.workers:
        worker.engine.advance(cluster.now + 1e6)
        worker.engine.kv.check()
        assert not worker.engine.has_work
        assert worker.engine.kv.used_blocks == 0


class Watching(ServesLate):
    """A placement policy that keeps what it was shown."""

    name = "watching"
    uses_prefixes = False

    def __init__(self, policy: PlacementPolicy | None = None) -> None:
        self.policy = policy or make_router("least-outstanding")
        self.seen: list[tuple[float, list[WorkerView]]] = []

    def prepare(self, workers: Sequence[WorkerView], now: float) -> None:
        self.policy.prepare(workers, now)

    def place(self, request: PlacementRequest, workers: Sequence[WorkerView], now: float) -> Decision:
        self.seen.append((now, list(workers)))
        return self.policy.place(request, workers, now)
