"""A short storm under load; `python -m tests.chaos.storm` raises a longer one."""

from __future__ import annotations

from collections.abc import Callable

import pytest

from tests.chaos.storm import DEADLINE_S, OPTIONS, Result, left_over, storm
from tests.conftest import Served

pytestmark = [pytest.mark.chaos, pytest.mark.timeout(240)]


def test_after_a_storm_every_request_has_ended_clearly_and_nothing_is_left(serve: Callable[..., Served]) -> None:
    served = serve(*OPTIONS, "--request-timeout", str(DEADLINE_S))
    result = storm(served.url, served.process.pid, lambda: left_over(served), seconds=45.0, rate_rps=6.0, seed=3)
    assert len(result.faults) >= 3
    assert result.broken() == []
    assert result.ends["complete"] > 0.5 * sum(result.ends.values())


def test_each_broken_promise_is_named() -> None:
    held = Result(before=0.95, after=0.9)
    assert held.broken() == []
    broken = Result(
        unclear=["stream_cut (HTTP 200)"] * 2,
        too_long=1,
        wrong_length=2,
        before=0.95,
        after=float("nan"),
        rest={"router_held w0": 3.0},
    )
    assert broken.broken() == [
        "an unclear error: stream_cut (HTTP 200)",
        "1 requests ended after their deadline",
        "2 answers have another length than was asked for",
        "router_held w0 is 3 at the end",
        "attainment was 0.950 before and is nan after",
    ]
