"""The simulated server: the real router core over simulated engines, with delays, faults and closed loops."""

from __future__ import annotations

from dataclasses import replace
from itertools import pairwise

import numpy as np
import pytest

from nexusengine.errors import ConfigError, InternalError
from nexusengine.router.core import RouterCore
from nexusengine.scheduler.baselines.fcfs import FCFS
from nexusengine.scheduler.registry import POLICIES
from nexusengine.sim import cluster as cluster_module
from nexusengine.sim.cluster import Cluster, LinkSettings, Outcome
from nexusengine.sim.engine import EngineSettings
from nexusengine.sim.faults import parse_fault
from nexusengine.sim.job import Job, TraceBlocks, make_job
from nexusengine.types import SLO
from tests.sim.clusters import LINK, MAX_LEN, QUIET, Watching, assert_nothing_left, make_cluster, make_jobs
from tests.sim.fakes import FormulaProfile


def run(cluster: Cluster, jobs: list[Job]) -> dict[str, Outcome]:
    return {o.job.request.request_id: o for o in cluster.run(jobs)}


@pytest.mark.parametrize("router", ["least-outstanding", "round-robin", "prism"])
@pytest.mark.parametrize("faults", [(), ("crash:0:1:0.5", "slow:1:0.5:4", "join:2:1.5")])
@pytest.mark.parametrize(("count", "gap_s", "kv_tokens"), [(150, 0.02, 20_000), (400, 0.003, 3_000)])
@pytest.mark.parametrize("seed", [0, 1])
def test_every_job_has_exactly_one_outcome_and_nothing_is_left(
    router: str, faults: tuple[str, ...], count: int, gap_s: float, kv_tokens: int, seed: int
) -> None:
    jobs = make_jobs(count, gap_s, seed)
    settings = replace(QUIET, noise=True, max_waiting=30)
    link = LinkSettings(0.004, 0.05, loss=0.3)
    cluster = make_cluster(
        3,
        router=router,
        settings=settings,
        link=link,
        faults=faults,
        seed=seed,
        kv_tokens=kv_tokens,
        timeout_s=1.5,
        max_held=60,
    )
    outcomes = cluster.run(jobs)
    assert_nothing_left(cluster, jobs, outcomes)
    if gap_s < 0.01:
        assert any(o.error for o in outcomes), "this load was meant to be too high"


def test_a_lone_request_takes_its_steps_and_four_links() -> None:
    outcome = run(make_cluster(1), [make_job("r", 0.5, 100, 11)])["r"]
    profile = FormulaProfile()
    prefill_s = profile.step_s(np.array([100], np.int32), np.array([0], np.int32))
    decodes_s = profile.decode_run_s(np.array([100], np.int32), 10).sum()
    assert outcome.first_token_s == pytest.approx(0.5 + prefill_s + 4 * LINK.link_delay_s)
    assert outcome.last_s == pytest.approx(outcome.first_token_s + decodes_s)


def test_a_request_that_comes_during_a_run_of_decodes_starts_at_the_next_step() -> None:
    jobs = [make_job("long", 0.0, 10, 500), make_job("late", 1.0, 10, 2)]
    outcomes = run(make_cluster(1), jobs)
    step_s = 0.006
    assert outcomes["late"].first_token_s - 1.0 < 4 * LINK.link_delay_s + 2 * step_s


@pytest.mark.parametrize("engine", sorted(POLICIES))
@pytest.mark.parametrize("kv_tokens", [20_000, 2_500])
def test_runs_of_like_steps_change_nothing_for_any_policy(engine: str, kv_tokens: int) -> None:
    rng = np.random.default_rng(1)
    jobs = [
        replace(job, request=replace(job.request, slo=SLO(rng.choice([0.1, 0.5, 2.0]), rng.choice([0.006, 0.02, 0.1]))))
        for job in make_jobs(40, 0.08, 1, prompt=400, output=50)
    ]
    settings = replace(QUIET, max_batch_tokens=1024)

    def ends(runs: bool) -> list[tuple[float, float]]:
        cluster = make_cluster(
            1, engine=engine, settings=replace(settings, runs=runs), kv_tokens=kv_tokens, perf="oracle"
        )
        return [(o.first_token_s, o.last_s) for o in cluster.run(jobs)]

    assert np.allclose(ends(True), ends(False), rtol=0, atol=1e-9)


def test_a_policy_can_ask_to_plan_every_step() -> None:
    class Thorough(FCFS):
        plans_every_step = True

    job = [make_job("r", 0.0, 10, 50)]
    plans = []
    for policy in (FCFS(), Thorough()):
        cluster = make_cluster(1, engine=policy)
        cluster.run(job)
        plans.append(len(cluster.workers[0].engine.planning_s))
    assert plans[0] < 5
    assert plans[1] == 50


def test_scheduler_time_is_charged_to_every_step() -> None:
    job = [make_job("r", 0.0, 100, 101)]
    free = run(make_cluster(1), job)["r"]
    dear = run(make_cluster(1, settings=replace(QUIET, scheduler_cost_s=0.002)), job)["r"]
    measured = run(make_cluster(1, settings=replace(QUIET, scheduler_cost_s=None)), job)["r"]
    assert dear.last_s - free.last_s == pytest.approx(101 * 0.002)
    assert measured.last_s > free.last_s


# ---- reports -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("period_s", [0.02, 0.5])
def test_the_router_sees_reports_as_old_as_the_snapshot_period(period_s: float) -> None:
    watching = Watching()
    link = LinkSettings(0.001, period_s)
    make_cluster(1, router=watching, link=link).run([make_job(f"r{i}", 0.37 * i, 50, 300) for i in range(12)])
    steps = [views[0].load.step for _, views in watching.seen if views[0].load is not None]
    assert steps == sorted(steps)
    assert len(set(steps)) > 3


def test_lost_reports_do_not_reach_the_router_and_its_ledger_is_still_right() -> None:
    jobs = make_jobs(100, 0.02)
    views = {}
    for loss in (0.0, 0.9):
        watching = Watching()
        cluster = make_cluster(2, router=watching, link=replace(LINK, loss=loss))
        outcomes = cluster.run(jobs)
        assert_nothing_left(cluster, jobs, outcomes)
        views[loss] = len({(v.worker_id, v.load.step) for _, seen in watching.seen for v in seen if v.load is not None})
    assert views[0.9] < 0.5 * views[0.0]


def test_a_report_shows_the_step_that_is_running() -> None:
    watching = Watching()
    jobs = [make_job("r", 0.0, 200, 400), *(make_job(f"s{i}", 0.5 + 0.2 * i, 5, 2) for i in range(5))]
    make_cluster(1, router=watching).run(jobs)
    loads = [views[0].load for _, views in watching.seen[1:] if views[0].load is not None]
    assert loads
    assert all(0.0 < load.step_running_s < 0.02 and load.step_upper_s > 0.0 for load in loads)
    assert all(load.decodes >= 1 and load.perf is not None for load in loads)


# ---- faults ------------------------------------------------------------------------------------------------------


def test_a_crash_sends_unseen_requests_elsewhere_and_ends_seen_ones() -> None:
    jobs = [
        make_job("seen", 0.0, 10, 400),
        make_job("other", 0.0, 10, 400),
        make_job("unseen", 0.999, 1500, 10),
        make_job("other-unseen", 0.999, 1500, 10),
    ]
    cluster = make_cluster(2, router="round-robin", faults=["crash:1:1.01:5"])
    outcomes = run(cluster, jobs)
    lost = "seen" if outcomes["seen"].error else "other"
    assert outcomes[lost].error == "worker_lost"
    assert all(o.error is None for name, o in outcomes.items() if name != lost)
    assert {outcomes[n].worker for n in outcomes if n != lost} == {"w0"}
    assert outcomes["unseen"].ended is not None
    assert [w.restarts for w in cluster.workers] == [0, 1]


def test_a_crashed_worker_comes_back_with_an_empty_engine_and_serves_again() -> None:
    watching = Watching()
    jobs = [make_job(f"r{i}", 0.1 * i, 50, 20) for i in range(60)]
    cluster = make_cluster(2, router=watching, faults=["crash:0:2:1"])
    outcomes = run(cluster, jobs)
    assert {o.worker for n, o in outcomes.items() if int(n[1:]) >= 40} == {"w0", "w1"}
    assert {o.worker for n, o in outcomes.items() if 21 <= int(n[1:]) < 29} == {"w1"}
    # a report of the new process includes its own dispatches, so that no work in flight is counted twice or not at all
    for _, views in watching.seen:
        for view in views:
            assert view.outstanding == 0 or view.load is None or view.load.last_dispatch_seq <= 60
            assert len(view.unreported) <= view.outstanding
    assert_nothing_left(cluster, jobs, list(outcomes.values()))


def test_a_slower_worker_takes_longer_from_that_instant_on() -> None:
    job = [make_job("r", 0.0, 10, 401)]
    plain = run(make_cluster(1), job)["r"]
    slow = run(make_cluster(1, faults=["slow:0:1:3"]), job)["r"]
    assert slow.first_token_s == plain.first_token_s
    assert slow.last_s - 1.0 == pytest.approx(3 * (plain.last_s - 1.0), rel=0.02)


def test_requests_wait_at_the_router_for_a_worker_that_joins_late() -> None:
    outcomes = run(make_cluster(1, faults=["join:0:2"]), [make_job("r", 0.5, 10, 5)])
    assert 2.0 < outcomes["r"].first_token_s < 2.1


@pytest.mark.parametrize("text", ["slow:0:1", "melt:0:1", "crash:2:1", "crash:0:x", "slow:0:1:0", "join:0:-1", ""])
def test_a_fault_that_makes_no_sense_is_refused(text: str) -> None:
    with pytest.raises(ConfigError, match="fault"):
        parse_fault(text, 2)


# ---- ends --------------------------------------------------------------------------------------------------------


def test_overload_ends_with_the_time_limit_of_requests() -> None:
    jobs = make_jobs(400, 0.002)
    cluster = make_cluster(1, timeout_s=2.0)
    outcomes = cluster.run(jobs)
    errors = {o.error for o in outcomes}
    assert "deadline_exceeded" in errors
    assert cluster.now < jobs[-1].request.arrival_s + 2.0 + 1.0 + 0.2
    assert_nothing_left(cluster, jobs, outcomes)


def test_what_has_not_ended_by_the_end_is_unfinished() -> None:
    outcomes = run(make_cluster(1, until_s=1.0), [make_job("r", 0.0, 10, 1000)])
    assert outcomes["r"].error == "unfinished"
    assert outcomes["r"].first_token_s < 1.0
    assert np.isnan(outcomes["r"].last_s)
    with pytest.raises(InternalError, match="arrives after the end"):
        make_cluster(1, until_s=1.0).run([make_job("a", 0.0, 10, 1000), make_job("b", 2.0, 10, 10)])


def test_a_full_queue_and_an_impossible_request_are_refused() -> None:
    jobs = [make_job(f"r{i}", 0.0, 1500, 100) for i in range(30)]
    outcomes = run(make_cluster(1, settings=replace(QUIET, max_waiting=4, max_running=2), max_held=4), jobs)
    assert sum(o.error == "overloaded" for o in outcomes.values()) > 10
    long = [make_job("r", 0.0, MAX_LEN, 1)]
    assert run(make_cluster(1), long)["r"].error == "context_length_exceeded"


def test_strict_judges_each_token_by_when_the_client_has_it() -> None:
    # ttft 20 ms: the first token has to be there after one step of about 5.1 ms and four links
    for delay_s, kept in ((0.001, True), (0.003, True), (0.004, False)):
        link = LinkSettings(delay_s, 0.05)
        settings = EngineSettings(noise=False, answer_delay_s=2 * delay_s)
        job = make_job("r", 0.0, 5, 1, slo=SLO(0.02, 0.05))
        outcome = run(make_cluster(1, link=link, settings=settings), [job])["r"]
        assert outcome.ended is not None
        assert outcome.ended.strict is kept is (outcome.first_token_s <= 0.02)


# ---- closed loops and prefixes -----------------------------------------------------------------------------------


def session(turns: int, think_s: float, *, blocks: bool = False) -> Job:
    """Each turn's prompt is the one before with its answer and 44 tokens more."""
    job: Job | None = None
    for i in range(turns - 1, -1, -1):
        prompt = 100 * (i + 1)
        named = TraceBlocks(range(100), 64, prompt + 56) if blocks else None
        turn = make_job(f"t{i}", 0.0, prompt, 56, blocks=named)
        job = replace(turn, think_s=think_s, then=job)
    assert job is not None
    return job


def test_the_next_turn_of_a_session_comes_after_the_answer_and_a_pause() -> None:
    outcomes = make_cluster(2).run([session(5, 0.7)])
    assert [o.job.request.request_id for o in outcomes] == [f"t{i}" for i in range(5)]
    for before, after in pairwise(outcomes):
        assert after.job.request.arrival_s == pytest.approx(before.last_s + 0.7)


def test_a_session_stops_when_arrivals_end() -> None:
    outcomes = make_cluster(2, last_arrival_s=1.5).run([session(20, 0.3)])
    assert 2 <= len(outcomes) <= 4
    assert all(o.error is None for o in outcomes)


def test_a_turn_finds_prompt_and_answer_of_the_turn_before_in_the_cache() -> None:
    caching = replace(QUIET, prefix_caching=True)
    outcomes = make_cluster(1, settings=caching).run([session(4, 0.1, blocks=True)])
    cached = [o.ended.cached_tokens for o in outcomes if o.ended]
    assert cached == [0, *(((100 * i + 56) - 1) // 16 * 16 for i in (1, 2, 3))]
    without = make_cluster(1).run([session(4, 0.1, blocks=True)])
    assert [o.ended.cached_tokens for o in without if o.ended] == [0, 0, 0, 0]
    assert outcomes[3].first_token_s - outcomes[3].job.request.arrival_s < (
        without[3].first_token_s - without[3].job.request.arrival_s
    )


def test_the_same_seed_gives_the_same_ends_and_another_one_does_not() -> None:
    jobs = make_jobs(80, 0.02)
    noisy = replace(QUIET, noise=True)
    ends = [
        [o.last_s for o in make_cluster(2, settings=noisy, link=replace(LINK, loss=0.5), seed=s).run(jobs)]
        for s in (1, 1, 2)
    ]
    assert ends[0] == ends[1] != ends[2]


@pytest.mark.parametrize("router", ["least-outstanding", "prism"])
def test_an_idle_day_is_skipped_and_changes_nothing(router: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Against the same jobs with every tick of the idle time simulated."""
    ticks = 0
    on_timer = RouterCore.on_timer

    def counted(core: RouterCore, now: float) -> None:
        nonlocal ticks
        ticks += 1
        on_timer(core, now)

    monkeypatch.setattr(RouterCore, "on_timer", counted)
    early, late = make_jobs(40, 0.02, 0), make_jobs(40, 0.02, 1)
    gap_s = 1200.0
    moved = [
        replace(job, request=replace(job.request, request_id=f"late{i}", arrival_s=job.request.arrival_s + gap_s))
        for i, job in enumerate(late)
    ]
    skipped = make_cluster(3, router=router, faults=("crash:1:600:5",)).run([*early, *moved])
    few = ticks
    monkeypatch.setattr(cluster_module, "_IDLE_TICKED_S", 1e9)
    every_tick = make_cluster(3, router=router, faults=("crash:1:600:5",)).run([*early, *moved])
    assert few < 3000 < 20_000 < ticks - few
    assert [(o.first_token_s, o.last_s, o.worker, o.error) for o in skipped] == [
        (o.first_token_s, o.last_s, o.worker, o.error) for o in every_tick
    ]


def test_a_gap_of_a_year_takes_no_longer_than_a_minute_of_it() -> None:
    jobs = [make_job("now", 0.0, 100, 5), make_job("later", 3e7, 100, 5)]
    steps: list[float] = []
    cluster = make_cluster(2, sample=lambda now, _: steps.append(now), sample_period_s=1e6)
    outcomes = run(cluster, jobs)
    assert [o.error for o in outcomes.values()] == [None, None]
    assert outcomes["later"].first_token_s - 3e7 == pytest.approx(outcomes["now"].first_token_s, abs=1e-6)
    assert len(steps) == 31  # samples go on through idle time
