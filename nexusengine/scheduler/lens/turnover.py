"""How fast seats come free. Once all are taken, this, and not the time for prompts, is what newcomers wait for."""

from __future__ import annotations

import math

import numpy as np

from nexusengine.arrays import F8

_MEMORY_S = 2.0
_LEAST_ENDED = 8.0  # below so many remembered ends the rate is anyone's guess


class Turnover:
    """Learns from plan to plan how often one of the seated sequences ends."""

    def __init__(self) -> None:
        self._ended = self._seat_s = 0.0  # remembered with an exponential memory
        self._seated, self._planned_s = 0, -math.inf

    def look(self, seated: int, now: float) -> None:
        """seated: sequences in their seats before this plan; those missing since `planned` have ended."""
        passed_s = now - self._planned_s
        if self._seated and passed_s > 0.0:
            keep = math.exp(-passed_s / _MEMORY_S)
            self._ended = keep * self._ended + max(self._seated - seated, 0)
            self._seat_s = keep * self._seat_s + self._seated * passed_s
        self._planned_s = now

    def planned(self, seated: int) -> None:
        """seated: sequences in their seats after this plan."""
        self._seated = seated

    def seat_s(self, seats: int) -> float:
        """How long it takes until a seat comes free while all are taken; 0 if that is not known."""
        return self._seat_s / (self._ended * seats) if self._ended >= _LEAST_ENDED else 0.0

    def seats_within(self, time_s: F8, free: int, seats: int) -> F8:
        """How many of all `seats`, of which some are free now, newcomers can take within `time_s [N]`."""
        seat_s = self.seat_s(seats)
        if not seat_s:
            return np.full(len(time_s), np.inf)
        within: F8 = free + np.maximum(time_s, 0.0) / seat_s
        return within
