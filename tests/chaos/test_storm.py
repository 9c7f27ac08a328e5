"""A short storm under load; `python -m tests.chaos.storm` raises a longer one."""

from __future__ import annotations

from collections.abc import Callable

import pytest

from tests.chaos.storm import DEADLINE_S, OPTIONS, left_over, storm
from tests.conftest import Served

pytestmark = [pytest.mark.chaos, pytest.mark.timeout(240)]


def test_after_a_storm_every_request_has_ended_clearly_and_nothing_is_left(serve: Callable[..., Served]) -> None:
    served = serve(*OPTIONS, "--request-timeout", str(DEADLINE_S))
    result = storm(served.url, served.process.pid, lambda: left_over(served), seconds=45.0, rate_rps=6.0, seed=3)
    assert len(result.faults) >= 3
    assert result.unclear == []
    assert (result.too_long, result.wrong_length, result.rest) == (0, 0, {})
    assert result.ends["complete"] > 0.5 * sum(result.ends.values())
    assert result.after >= result.before - 0.1, f"{result.before} before, {result.after} after"
