"""Time as an argument: the real monotonic clock, and a virtual one for tests and the simulator.

All `*_s` timestamps in this project are seconds of CLOCK_MONOTONIC, which every process of one host shares.
"""

from __future__ import annotations

import time
from typing import Protocol


class Clock(Protocol):
    def now(self) -> float:
        """Seconds on a monotonic clock."""
        ...


class MonotonicClock:
    """CLOCK_MONOTONIC of this host."""

    def now(self) -> float:
        return time.monotonic()


class VirtualClock:
    """A clock that moves only when told to."""

    def __init__(self, start_s: float = 0.0) -> None:
        self._now_s = start_s

    def now(self) -> float:
        return self._now_s

    def advance(self, seconds: float) -> None:
        """Raises ValueError if `seconds` is negative: time never goes back."""
        if seconds < 0:
            raise ValueError(f"cannot move the clock back by {-seconds} s")
        self._now_s += seconds
