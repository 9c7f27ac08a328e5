"""The longest step for the sake of requests that are yet to come."""

from __future__ import annotations

import math

import numpy as np
import pytest

from nexusengine.perf.features import StepFeatures
from nexusengine.scheduler.lens.step_cap import StepCap
from tests.support.lens_views import Straight

BATCH = 2048
WHOLE_S = Straight().predict(StepFeatures(BATCH, 1, 1)).mean_s  # 50 ms, of which 9 are fixed
SLOW = Straight(extra_s=0.2)  # 205 ms fixed: a small step is dear


def after(*arrivals: tuple[float, float, float], now: float = 20.0, model: Straight | None = None) -> float:
    """arrivals: when, slack and work of each, seconds."""
    cap = StepCap()
    for at_s, slack_s, work_s in arrivals:
        cap.arrived(at_s, np.array([slack_s]), np.array([work_s]))
    return cap.prompts_s(model or Straight(), BATCH, now)


def test_there_is_no_cap_where_nobody_with_an_slo_has_come_lately() -> None:
    assert after() == math.inf
    assert after((0.0, 0.01, 0.05), now=61.0) == math.inf
    assert after((0.0, 0.01, 0.05), now=59.0) < math.inf


def test_a_step_may_last_as_long_as_those_who_come_can_wait() -> None:
    often = [(0.1 * i, 2.0, 0.05) for i in range(200)]
    assert after(*often) == pytest.approx(1.0)  # half of their slack
    assert after(*often[:-1], (20.0, 0.2, 0.05)) == pytest.approx(0.1)


def test_steps_become_shorter_the_more_work_would_come_too_late() -> None:
    def cap_s(each_s: float) -> float:
        return after(*((each_s * i, 0.02, 0.05) for i in range(int(20.0 / each_s))))

    caps_s = [cap_s(each_s) for each_s in (20.0, 2.0, 0.2, 0.1)]
    assert caps_s == sorted(caps_s, reverse=True)
    assert caps_s[0] == pytest.approx(WHOLE_S, rel=1e-6)
    assert caps_s[-1] < 0.8 * WHOLE_S


@pytest.mark.parametrize("model", [Straight(), SLOW, Straight(extra_s=0.0)])
@pytest.mark.parametrize("slack_s", [0.0, 0.01, 0.1])
def test_the_cap_costs_at_most_a_tenth_of_the_throughput(model: Straight, slack_s: float) -> None:
    cap_s = after(*((0.02 * i, slack_s, 0.05) for i in range(1000)), model=model)
    tokens = np.arange(1.0, BATCH + 1)
    one = np.ones(BATCH)
    step_s = model.mean_s(tokens, one, one, 0 * one, 0 * one)
    fits = tokens[step_s <= cap_s + 1e-9].max()
    assert fits / step_s[int(fits) - 1] >= 0.9 * BATCH / step_s[-1]


def test_one_late_request_in_a_minute_is_not_worth_short_steps() -> None:
    assert after((19.0, 0.0, 0.01), model=SLOW) == pytest.approx(SLOW.predict(StepFeatures(BATCH, 1, 1)).mean_s)
