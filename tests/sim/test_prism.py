"""PRISM in small simulated clusters: unlike devices, alike ones, stale reports, shared prefixes, faults."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import replace
from functools import partial
from itertools import permutations

import numpy as np
import pytest

from nexusengine.perf.features import StepFeatures
from nexusengine.perf.model import PerformanceModel
from nexusengine.perf.registry import make_model
from nexusengine.router.placement.candidates import ServesLate
from nexusengine.router.placement.policy import Place, PlacementPolicy, PlacementRequest, WorkerView
from nexusengine.router.placement.registry import make_policy as make_router
from nexusengine.scheduler.registry import make_policy
from nexusengine.sim.cluster import Cluster, LinkSettings, Outcome
from nexusengine.sim.engine import EngineSettings, SimEngine
from nexusengine.sim.faults import parse_fault
from nexusengine.sim.job import Job, TraceBlocks, make_job
from nexusengine.sim.verdicts import verdict
from nexusengine.types import SLO
from tests.sim.clusters import assert_nothing_left
from tests.sim.fakes import FormulaProfile

SETTINGS = EngineSettings(noise=False, max_running=64, max_batch_tokens=512)
LINK = LinkSettings(link_delay_s=0.0005, snapshot_period_s=0.1)
QUICK, SLACK = SLO(0.3, 0.02), SLO(3.0, 0.2)


def taught(profile: FormulaProfile) -> PerformanceModel:
    """As after calibration."""
    model = make_model()
    for q in (1, 8, 64, 256, 512):
        for decodes in (0, 8, 32):
            kv = decodes * 300
            mixed = StepFeatures(decodes + q, decodes + 1, int(q > 1), 0.5 * q * q if q > 1 else 0.0, kv)
            counts = np.array([1] * decodes + [q], np.int32)
            contexts = np.array([300] * decodes + [0], np.int32)
            model.observe(mixed, profile.step_s(counts, contexts))
    return model


def make_cluster(
    speeds: Sequence[float],
    router: str | PlacementPolicy,
    *,
    link: LinkSettings = LINK,
    faults: Sequence[str] = (),
    caching: bool = False,
    timeout_s: float = 30.0,
) -> Cluster:
    def maker(i: int) -> SimEngine:
        profile = FormulaProfile(30_000, speeds[i])
        settings = replace(SETTINGS, prefix_caching=caching)
        rng = np.random.default_rng(i)
        return SimEngine(profile, make_policy("lens"), taught(profile), settings, max_model_len=8192, rng=rng)

    return Cluster(
        [partial(maker, i) for i in range(len(speeds))],
        make_router(router) if isinstance(router, str) else router,
        link,
        np.random.default_rng(0),
        faults=[parse_fault(text, len(speeds)) for text in faults],
        timeout_s=timeout_s,
    )


def make_jobs(rate: float, count: int = 200, seed: int = 1) -> list[Job]:
    """Two classes of promises; prompts of some hundred tokens, outputs of some dozen."""
    rng = np.random.default_rng(seed)
    at_s = np.cumsum(rng.exponential(1 / rate, count))
    return [
        make_job(
            f"r{i}",
            float(t),
            int(rng.integers(50, 1500)),
            int(rng.integers(5, 80)),
            slo=QUICK if rng.random() < 0.6 else SLACK,
        )
        for i, t in enumerate(at_s)
    ]


def attainment(outcomes: Sequence[Outcome]) -> float:
    return float(np.mean([verdict(o).met for o in outcomes]))


def simulated(speeds: Sequence[float], router: str, jobs: list[Job], **more: object) -> float:
    cluster = make_cluster(speeds, router, **more)  # type: ignore[arg-type]
    outcomes = cluster.run(jobs)
    assert_nothing_left(cluster, jobs, outcomes)
    return attainment(outcomes)


def test_requests_a_device_cannot_serve_in_time_go_to_one_that_can() -> None:
    """A decode step takes the slow devices 25 ms, and the quick class was promised 20."""
    jobs = make_jobs(rate=40.0)
    prism = simulated((1.0, 1.0, 0.2, 0.2), "prism", jobs)
    assert prism > 0.97
    assert prism > simulated((1.0, 1.0, 0.2, 0.2), "least-requests", jobs) + 0.05
    assert prism >= simulated((1.0, 1.0, 0.2, 0.2), "capacity-weighted", jobs)


@pytest.mark.parametrize("rate", [40.0, 110.0])
def test_among_alike_devices_it_is_as_good_as_any(rate: float) -> None:
    jobs = make_jobs(rate, count=250)
    prism = simulated((1.0,) * 4, "prism", jobs)
    for other in ("rr-veto", "least-requests"):
        assert prism >= simulated((1.0,) * 4, other, jobs) - 0.02, other


def test_lightly_loaded_alike_devices_get_equal_shares() -> None:
    cluster = make_cluster((1.0,) * 4, "prism")
    outcomes = cluster.run(make_jobs(rate=8.0, count=120))
    counts = Counter(o.worker for o in outcomes)
    assert max(counts.values()) <= 1.3 * 120 / 4
    assert attainment(outcomes) == 1.0


def test_rare_and_lost_reports_cost_little_because_own_dispatches_are_counted() -> None:
    jobs = make_jobs(rate=60.0)
    speeds = (1.0, 1.0, 0.4, 0.4)
    fresh = simulated(speeds, "prism", jobs, link=LinkSettings(0.0005, 0.02))
    stale = simulated(speeds, "prism", jobs, link=LinkSettings(0.0005, 1.0, loss=0.2))
    assert fresh > 0.9
    assert stale > fresh - 0.05


def test_a_slow_a_crashing_and_a_joining_worker_leave_nothing_behind() -> None:
    jobs = make_jobs(rate=50.0, count=250)
    faults = ("slow:0:1:1.4", "crash:1:2:1.5", "join:3:3")
    link = LinkSettings(0.002, 0.1, loss=0.1)
    assert simulated((1.0, 1.0, 0.5, 1.0), "prism", jobs, link=link, faults=faults) > 0.6


def conversations(count: int = 30, turns: int = 5) -> list[Job]:
    """Each turn's prompt is all that was said before and some more; the next comes when the reply has been read."""
    rng = np.random.default_rng(3)
    firsts = []
    for c in range(count):
        job: Job | None = None
        for t in reversed(range(turns)):
            prompt = 640 * (t + 1) + int(rng.integers(0, 64))
            blocks = TraceBlocks(tuple(range(10 * (t + 1))), 64, prompt, scope=c)
            made = make_job(f"c{c}t{t}", 0.15 * c, prompt, 20, slo=SLO(0.5, 0.05), blocks=blocks)
            job = replace(made, then=job, think_s=float(rng.exponential(1.0)))
        assert job is not None
        firsts.append(job)
    return firsts


def test_conversations_go_back_to_where_their_beginning_is_cached() -> None:
    results = {}
    for router in ("prism", "cache-aware", "least-requests"):
        cluster = make_cluster((1.0, 1.0, 0.6, 0.6), router, caching=True)
        outcomes = cluster.run(conversations())
        engines = [w.engine for w in cluster.workers]
        cached, prompts = (sum(getattr(e.stats, k) for e in engines) for k in ("cached_tokens", "prompt_tokens"))
        results[router] = attainment(outcomes), cached / prompts
        if router != "least-requests":
            counters = cluster.core.cluster().counters
            assert counters["prefix_prompt_tokens"] == prompts
            assert counters["prefix_hit_tokens"] == cached
            assert counters["prefix_error_tokens"] < 0.1 * cached, "hits are predicted"
            assert cluster.core.workers.block_sizes() == {16}
    assert results["prism"][1] >= 0.9 * results["cache-aware"][1]
    assert results["prism"][0] >= results["cache-aware"][0]
    assert results["prism"][1] > 1.3 * results["least-requests"][1]


class Split(ServesLate):
    """A placement by hand: so many requests to each worker, spread over the batch."""

    name = "split"
    uses_prefixes = False

    def __init__(self, counts: Sequence[int]) -> None:
        self._counts, self._placed = counts, [0] * len(counts)

    def prepare(self, workers: Sequence[WorkerView], now: float) -> None:
        pass

    def place(self, request: PlacementRequest, workers: Sequence[WorkerView], now: float) -> Place:
        behind = [(n + 1) / count if count else np.inf for n, count in zip(self._placed, self._counts, strict=True)]
        i = int(np.argmin(behind))
        self._placed[i] += 1
        return Place(workers[i].worker_id, "by hand")


def offline(count: int, prompt: tuple[int, int], output: tuple[int, int]) -> list[Job]:
    rng = np.random.default_rng(5)
    return [make_job(f"r{i}", 0.5, int(rng.integers(*prompt)), int(rng.integers(*output))) for i in range(count)]


def makespan(speeds: Sequence[float], router: str | Split, jobs: list[Job]) -> float:
    cluster = make_cluster(speeds, router, timeout_s=3600.0)
    return max(o.last_s for o in cluster.run(jobs)) - 0.5


def best_split(speeds: Sequence[float], jobs: list[Job]) -> float:
    """The least makespan over splits: requests move between workers, fewer at a time, while that makes it less."""
    counts, moved = [len(jobs) // len(speeds)] * len(speeds), len(jobs) // 4
    counts[0] += len(jobs) - sum(counts)
    best_s = makespan(speeds, Split(counts), jobs)
    while moved:
        better = False
        for a, b in permutations(range(len(speeds)), 2):
            tried = [n + moved * ((i == b) - (i == a)) for i, n in enumerate(counts)]
            if min(tried) >= 0 and (took_s := makespan(speeds, Split(tried), jobs)) < best_s:
                counts, best_s, better = tried, took_s, True
        moved = moved if better else moved // 2
    return best_s


@pytest.mark.parametrize(
    ("speeds", "jobs"),
    [
        ((1.0, 0.3, 0.15), offline(60, (50, 400), (20, 80))),
        ((1.0, 0.7), offline(200, (50, 400), (20, 80))),
        ((1.0, 0.4), offline(60, (1000, 3000), (2, 8))),
        ((1.0, 1.0, 1.0), offline(30, (50, 400), (20, 80))),
    ],
    ids=["short", "rounds", "prompts", "equal"],
)
def test_an_offline_batch_is_done_within_a_tenth_of_the_best_split(speeds: Sequence[float], jobs: list[Job]) -> None:
    assert makespan(speeds, "prism", jobs) <= 1.1 * best_split(speeds, jobs)


@pytest.mark.parametrize("at_s", [0.0, 0.05, 0.5], ids=["no report yet", "reports under way", "reported"])
def test_bursts_without_a_promise_are_spread_evenly_over_equals(at_s: float) -> None:
    cluster = make_cluster((1.0, 1.0), "prism")
    jobs = [make_job(f"b{b}r{i}", at_s + 0.4 * b, 12 + i, 32) for b in range(3) for i in range(32)]
    outcomes = cluster.run(jobs)
    for b in range(3):
        counts = Counter(o.worker for o in outcomes if o.job.request.request_id.startswith(f"b{b}"))
        assert abs(counts["w0"] - counts["w1"]) <= 2


def test_requests_without_a_promise_do_no_harm_to_those_with_one() -> None:
    promised = make_jobs(rate=50.0)
    more = [make_job(f"n{i}", 1.0 + 0.02 * i, 400, 60) for i in range(100)]
    cluster = make_cluster((1.0, 1.0, 0.5), "prism", timeout_s=600.0)
    outcomes = cluster.run(sorted(promised + more, key=lambda j: j.request.arrival_s))
    alone = simulated((1.0, 1.0, 0.5), "prism", promised)
    assert attainment([o for o in outcomes if o.job.request.slo is not None]) >= alone - 0.02
    assert all(o.error is None for o in outcomes if o.job.request.slo is None)
