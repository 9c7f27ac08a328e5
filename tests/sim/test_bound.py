"""The offline bound: above what exhaustive search finds on tiny loads, and above every policy on small ones."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cache

import numpy as np
import pytest

from nexusengine.profiles.base import ProfileIdentity
from nexusengine.profiles.fit import FEATURES
from nexusengine.profiles.fitted import FittedProfile
from nexusengine.profiles.noise import Noise
from nexusengine.profiles.registry import load_profile
from nexusengine.sim.api import SimSpec, parse_devices, simulate
from nexusengine.sim.bound import EngineLimits, upper_bound
from nexusengine.sim.job import Job, make_job
from nexusengine.types import SLO

BATCH, ROWS = 3, 2
_EPSILON = 1e-9


def made_up(seed: int) -> FittedProfile:
    rng = np.random.default_rng(seed)
    weights_s = np.zeros(FEATURES)
    weights_s[0] = rng.uniform(0.0, 0.02)  # a step
    weights_s[1] = rng.uniform(0.0, 0.005)  # with a chunk
    weights_s[2] = 100 * rng.uniform(0.001, 0.02)  # a token
    weights_s[-4] = rng.uniform(0.0, 0.005)  # each chunk
    weights_s[-3] = 1e6 * rng.uniform(0.0, 0.002)  # a pair
    weights_s[-2] = 1e4 * rng.uniform(0.0, 0.002)  # a KV token
    identity = ProfileIdentity("made-up", "any", "", "roofline", 64, 0)
    return FittedProfile(identity, weights_s=weights_s.tolist(), noise=Noise([1.0, 1.0], [1.0, 1.0]))


def tiny_load(seed: int) -> list[Job]:
    rng = np.random.default_rng(seed)
    return [
        make_job(
            f"r{i}",
            float(rng.uniform(0.0, 0.1)),
            int(rng.integers(1, 5)),
            int(rng.integers(1, 4)),
            slo=SLO(float(rng.uniform(0.02, 0.2)), float(rng.uniform(0.01, 0.06))),
        )
        for i in range(3)
    ]


@dataclass(frozen=True)
class _Served:
    """A request in the search: tokens computed, output tokens, and when the first of these came."""

    computed: int = 0
    outputs: int = 0
    first_s: float = 0.0


def most_in_time(jobs: Sequence[Job], profile: FittedProfile) -> int:
    """By trying every sequence of steps of up to ROWS requests and BATCH tokens, any number of tokens of each."""

    def options(job: Job, served: _Served, now: float) -> range:
        if job.request.arrival_s > now or served.outputs == job.output_tokens:
            return range(1)
        return range(2) if served.outputs else range(job.prompt_tokens - served.computed + 1)

    def failed(job: Job, served: _Served, now: float) -> bool:
        slo = job.request.slo
        assert slo is not None
        if served.outputs:
            first_due_s = job.request.arrival_s + slo.ttft_s
            last_due_s = served.first_s + (job.output_tokens - 1) * slo.tpot_s
            return served.first_s > first_due_s + _EPSILON or now > last_due_s + _EPSILON
        return now > job.request.arrival_s + slo.ttft_s + _EPSILON

    @cache
    def best(now: float, state: tuple[_Served | None, ...]) -> int:
        """Requests that can still be in time; None: it has failed, and nothing more is done for it."""
        state = tuple(
            None if s is None or (s.outputs < j.output_tokens and failed(j, s, now)) else s
            for j, s in zip(jobs, state, strict=True)
        )
        done = sum(s is not None and s.outputs == j.output_tokens for j, s in zip(jobs, state, strict=True))
        open_ = [i for i, s in enumerate(state) if s is not None and s.outputs < jobs[i].output_tokens]
        if not open_:
            return done
        found = done
        later = [jobs[i].request.arrival_s for i in open_ if jobs[i].request.arrival_s > now]
        if later:
            found = max(found, best(min(later), state))
        choices: list[dict[int, int]] = [{}]
        for i in open_:
            served = state[i]
            assert served is not None
            choices = [
                c | ({i: q} if q else {})
                for c in choices
                for q in options(jobs[i], served, now)
                if sum(c.values()) + q <= BATCH and len(c) + (q > 0) <= ROWS
            ]
        for choice in filter(None, choices):
            found = max(found, best(*stepped(now, state, choice)))
        return found

    def stepped(
        now: float, state: tuple[_Served | None, ...], choice: dict[int, int]
    ) -> tuple[float, tuple[_Served | None, ...]]:
        counts = np.array(list(choice.values()), np.int32)
        served = [s for i in choice if (s := state[i]) is not None]
        contexts = np.array([s.computed for s in served], np.int32)
        end_s = now + profile.step_s(counts, contexts)
        after = list(state)
        for (i, q), s in zip(choice.items(), served, strict=True):
            computed = s.computed + q
            if computed < jobs[i].prompt_tokens:
                after[i] = replace(s, computed=computed)
            else:
                now_served = _Served(computed, s.outputs + 1, s.first_s if s.outputs else end_s)
                after[i] = None if failed(jobs[i], now_served, end_s) else now_served
        return end_s, tuple(after)

    return best(0.0, tuple(_Served() for _ in jobs))


def test_exhaustive_search_never_exceeds_it() -> None:
    reached, tight = [], 0
    for seed in range(24):
        profile, jobs = made_up(seed), tiny_load(seed)
        most = most_in_time(jobs, profile)
        bound = upper_bound(jobs, [profile], EngineLimits(BATCH, ROWS, block_size=1))
        assert most <= bound.requests + 1e-9, seed
        reached.append(most)
        tight += most == int(bound.requests + 1e-9)
    assert {0, 1, 2} <= set(reached), "the loads are of all kinds"
    assert tight >= 14, "and the bound is mostly the answer"


SPEC = SimSpec(
    trace="lengths:input=200..3000,output=10..200",
    devices="h100",
    arrivals="poisson",
    duration_s=12.0,
    classes="interactive",
    noise=False,
)


@pytest.mark.parametrize("devices", ["h100", "l4,rtx4090"])
@pytest.mark.parametrize("engine", ["lens", "fcfs:budget=512", "edf:budget=1024,relegate=1", "srpt:budget=1024"])
def test_no_policy_exceeds_it(devices: str, engine: str) -> None:
    for seed, rate_rps in ((1, 6.0), (2, 30.0)):
        spec = replace(SPEC, devices=devices, engine=engine, seed=seed, rate_rps=rate_rps)
        result = simulate(spec)
        profiles = [load_profile(name) for name in parse_devices(devices)]
        limits = EngineLimits(spec.max_batch_tokens, spec.max_running, spec.block_size, 2 * spec.link_delay_s)
        bound = upper_bound(result.workload.jobs, profiles, limits)
        assert result.metrics["attainment"] <= bound.share + 1e-9
        assert 0.0 < bound.share <= bound.work_only <= 1.0


def test_more_load_lowers_it_and_another_device_raises_it() -> None:
    limits = EngineLimits(2048, 256)
    loads = [simulate(replace(SPEC, engine="fcfs", rate_rps=rate)).workload.jobs for rate in (20.0, 60.0)]
    h100 = load_profile("h100")
    low, high = (upper_bound(jobs, [h100], limits) for jobs in loads)
    two = upper_bound(loads[1], [h100, h100], limits)
    assert high.share < low.share
    assert high.share < two.share
    assert high.share < 0.95
    assert ((high.value >= 0.0) & (high.value <= 1.0)).all()


def test_a_device_that_is_too_slow_for_a_promise_adds_nothing() -> None:
    """An L4 takes 70 ms to read its weights, so no TPOT of 50 ms is met there."""
    jobs = simulate(replace(SPEC, engine="fcfs", rate_rps=60.0)).workload.jobs
    h100, l4, limits = load_profile("h100"), load_profile("l4"), EngineLimits(2048, 256)
    alone, beside = upper_bound(jobs, [h100], limits), upper_bound(jobs, [h100, l4, l4], limits)
    assert beside.requests == pytest.approx(alone.requests, rel=0.01)
    assert not beside.able[l4.identity.name].any()


def test_a_load_without_promises_has_no_bound() -> None:
    with pytest.raises(ValueError, match="SLO"):
        upper_bound([make_job("r0", 0.0, 10, 5)], [load_profile("h100")], EngineLimits(256, 8))
