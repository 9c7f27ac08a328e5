"""Predicted TTFTs against those that then come, on an engine core in virtual time."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import pytest

from nexusengine.clock import VirtualClock
from nexusengine.perf.features import StepFeatures
from nexusengine.slo.classes import CLASSES
from nexusengine.types import SLO
from tests.support.fakes import FakeExecutor, make_core, request
from tests.support.timed import Arrival, Served, StepSeconds, TimedCore

LENGTHS = (20, 40, 60, 100, 150, 200, 300, 400, 500, 600)
NAMES = ("interactive", "standard", "batch")


def slow_cpu(noise: float, seed: int = 0, busy_after_s: float = float("inf")) -> StepSeconds:
    """About SmolLM2-135M on one core; twice as slow once others are busy on it."""
    rng = np.random.default_rng(seed)

    def seconds(step: StepFeatures, now: float) -> float:
        mean_s = 0.04 + 0.0045 * step.tokens + 5e-8 * step.prefill_attention + 1e-5 * step.decode_kv_tokens
        return mean_s * (2.0 if now > busy_after_s else 1.0) * float(np.exp(noise * rng.standard_normal()))

    return seconds


def slo(i: int, promised: bool) -> SLO | None:
    return CLASSES[NAMES[i % 3]].slo(LENGTHS[i % 10]) if promised else None


def loads(promised: bool) -> list[list[Arrival]]:
    """One by one, in bursts, and as they come at half the rate that the device can bear."""
    alone = [[Arrival(0.0, n, slo=slo(i, promised))] for i, n in enumerate(LENGTHS)]
    bursts = [[Arrival(0.002 * i, LENGTHS[i % 10], slo=slo(i, promised)) for i in range(n)] for n in (4, 8, 16)]
    at_s = np.cumsum(np.random.default_rng(7).exponential(2.0, 40)).tolist()
    return [*alone, *bursts, [Arrival(t, LENGTHS[i * 7 % 10], slo=slo(i * 7, promised)) for i, t in enumerate(at_s)]]


def errors(served: Sequence[Served]) -> np.ndarray:
    return np.abs([s.error for s in served if s.error is not None])


@pytest.mark.parametrize("policy", ["lens", "fcfs"])
@pytest.mark.parametrize("noise", [0.0, 0.15])
def test_what_is_told_is_near_what_comes(policy: str, noise: float) -> None:
    core = TimedCore(slow_cpu(noise), policy)
    served = [s for promised in (False, True) for load in loads(promised) for s in core.serve(load)]
    off = errors(served)
    assert len(off) > 0.5 * len(served), "most are told"
    assert np.median(off) <= 0.15
    assert np.percentile(off, 90) <= 0.50


def test_a_device_that_others_slow_down_is_predicted_anew_before_long() -> None:
    core = TimedCore(slow_cpu(0.05, busy_after_s=400.0))
    for load in (*loads(False), *loads(False)):
        core.serve(load)
    assert core.clock.now() < 400.0
    core.clock.advance(400.0)
    served = [s for load in [*loads(False), *loads(False)] for s in core.serve(load)]
    assert np.median(errors(served)) <= 0.15
    assert np.percentile(errors(served), 90) <= 0.50


def test_nothing_is_told_before_the_model_is_trustworthy() -> None:
    """On the first requests of a device that is nothing like what the model believes of one, or is told at once."""
    for calibrate_s in (0.0, 2.0):
        core = TimedCore(slow_cpu(0.1), calibrate_s=calibrate_s)
        served = [s for n in (60, 300, 20, 600, 100, 200) for s in core.serve([Arrival(0.0, n)])]
        assert served[0].service.predicted_ttft_s is None
        assert errors(served).max(initial=0.0) < 0.5


def test_a_request_is_predicted_with_all_that_came_with_it() -> None:
    core = TimedCore(slow_cpu(0.0), "fcfs")
    for _ in range(12):
        core.serve([Arrival(0.0, 600)])
    (alone,) = core.serve([Arrival(0.0, 600)])
    both = core.serve([Arrival(0.0, 600), Arrival(0.0, 360)])
    for served in (alone, *both):
        assert served.service.predicted_ttft_s == pytest.approx(served.timings.ttft_s, rel=0.1)


def test_the_time_spent_before_the_first_plan_counts() -> None:
    clock = VirtualClock()
    core = make_core(FakeExecutor(clock=clock, step_s=0.1), clock=clock)
    for n in range(10):
        core.add(request(f"before {n}", list(range(8)), 2, arrival_s=clock.now()))
        while core.has_work:
            core.step()
    clock.advance(5.0)
    core.add(request("a", list(range(8)), 2, arrival_s=clock.now() - 3.0))
    (service,) = (d.service for d in core.step() if d.service is not None)
    assert service.predicted_ttft_s == pytest.approx(3.1, rel=0.05)


def test_nothing_is_told_of_those_whom_the_policy_puts_behind_all_others() -> None:
    core = TimedCore(slow_cpu(0.0), "lens")
    for _ in range(2):
        for load in loads(True):
            core.serve(load)
    served = core.serve([Arrival(0.001 * i, 500, slo=SLO(9.0, 0.5)) for i in range(8)])
    late = [s for s in served if s.timings.ttft_s is not None and s.timings.ttft_s > 9.0]
    assert late, "eight such prompts take more than 9 s"
    assert errors(served).max(initial=0.0) < 0.5
    assert any(s.service.predicted_ttft_s is None for s in late)
