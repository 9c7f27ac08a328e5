"""Prompts are served as they came where that breaks no promise and little is to be done, else by deadline."""

from __future__ import annotations

import numpy as np

from nexusengine.scheduler.lens.policy import Lens
from tests.support.lens_views import Bench


def served(long_ttft_s: float, short_ttft_s: float, *, priority: int = 0, busy: bool = False) -> list[int]:
    """Slots in the order in which a step serves a long prompt (0) and a short one that came later (1)."""
    bench = Bench()
    bench.wait(4000, arrival_s=0.0, ttft_s=long_ttft_s)  # 97 ms of work
    bench.wait(500, arrival_s=0.1, ttft_s=short_ttft_s, priority=priority)
    policy = Lens()
    policy._seen_tokens = 8192
    if busy:
        policy._step_cap.arrived(0.0, np.full(20, 10.0), np.full(20, 0.4))  # 8 s of work in the last ten
    slots: list[int] = policy.plan(bench.view(), 0.1).slots.tolist()
    return slots


def test_a_long_prompt_is_not_overtaken_by_later_ones_that_have_time_to_spare() -> None:
    assert served(10.0, 1.0) == [0, 1]


def test_where_much_work_arrives_the_earliest_deadline_goes_first() -> None:
    assert served(10.0, 1.0, busy=True) == [1, 0]


def test_one_that_would_have_to_wait_for_more_than_half_of_its_slack_goes_first() -> None:
    assert served(10.0, 0.15) == [1, 0]


def test_priority_goes_before_arrival() -> None:
    assert served(10.0, 1.0, priority=1)[0] == 1
