"""Keeps the longest prompts from being the ones whose SLO is always missed.

Leaving out the largest is what keeps the most promises, and what would leave out the longest prompts almost always. As
long as nine of ten requests can be kept, three of four of the longest tenth are to be among them: the three that are
cheapest to keep. Keeping the very longest too would cost many of the others.
"""

from __future__ import annotations

import math

from nexusengine.arrays import I4, Bools

_MEMORY = 200.0  # requests
_GOAL = 0.9  # share of all requests to serve in time, below which none is protected
_LONG_SHARE = 0.1
_QUANTILE_STEP = 0.05


class LengthGuard:
    """Learns where the longest tenth of prompts begins, and how many of it are served in time.

    Over about 200 requests it follows that length, the length within the tenth beyond which a prompt is not protected,
    and which shares of the tenth and of all missed their SLO.

    Args:
        goal_long: share of the longest tenth to serve in time.
    """

    def __init__(self, goal_long: float) -> None:
        self._lost_of_all, self._lost_of_long = 1.0 - _GOAL, 1.0 - goal_long
        self.lost = self.lost_long = 0.0
        self._long = _Quantile(_LONG_SHARE)
        self._longest = _Quantile(_LONG_SHARE * self._lost_of_long)

    @property
    def active(self) -> bool:
        return self.lost_long > 0.5 * self._lost_of_long and self.lost < 0.8 * self._lost_of_all

    @property
    def long_tokens(self) -> tuple[float, float]:
        """Lengths of prompts between which one counts as long and is worth keeping."""
        return math.exp(self._long.value), math.exp(self._longest.value)

    def decided(self, prompt_tokens: int, lost: bool) -> None:
        """A request got its first token in time, or was lost."""
        log_length = math.log(max(prompt_tokens, 1))
        long = self._long.observe(log_length)
        self._longest.observe(log_length)
        self.lost += (lost - self.lost) / _MEMORY
        if long:
            self.lost_long += (lost - self.lost_long) / (_LONG_SHARE * _MEMORY)

    def protected(self, prompt_tokens: I4) -> Bools:
        low, high = self.long_tokens
        long: Bools = (prompt_tokens >= low) & (prompt_tokens < high)
        return long


class _Quantile:
    """What a share of the values exceeds, followed with steps of a fixed size."""

    def __init__(self, above: float) -> None:
        self.value, self._above = 0.0, above

    def observe(self, value: float) -> bool:
        """Whether it is at least what the quantile was."""
        if not self.value:
            self.value = value
        above = value >= self.value
        self.value += _QUANTILE_STEP * (above - self._above)
        return above
