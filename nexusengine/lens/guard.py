"""That it is not always the longest prompts whose promises are broken.

Leaving out the largest is what keeps the most promises, and what would leave out the longest prompts almost always. As
long as nine of ten requests can be kept, three of four of the longest tenth are to be among them.
"""

from __future__ import annotations

import math

from nexusengine.lens.view import I4, Bools

_MEMORY = 200.0  # requests
_LONG_SHARE = 0.1
_QUANTILE_STEP = 0.05


class LengthGuard:
    """Learns where the longest tenth begins and which shares of it and of all were lost, over about 200 requests.

    goal, goal_long: shares to keep of all requests and of the longest tenth.
    """

    def __init__(self, goal: float, goal_long: float) -> None:
        self._lost_of_all, self._lost_of_long = 1.0 - goal, 1.0 - goal_long
        self.lost = self.lost_long = 0.0
        self._log_length = 0.0

    @property
    def active(self) -> bool:
        return self.lost_long > 0.5 * self._lost_of_long and self.lost < 0.8 * self._lost_of_all

    @property
    def long_tokens(self) -> float:
        """Length of a prompt from which it counts as long."""
        return math.exp(self._log_length)

    def decided(self, prompt_tokens: int, lost: bool) -> None:
        """A request got its first token in time, or was lost."""
        log_length = math.log(max(prompt_tokens, 1))
        if not self._log_length:
            self._log_length = log_length
        long = log_length >= self._log_length
        self._log_length += _QUANTILE_STEP * ((1.0 - _LONG_SHARE) if long else -_LONG_SHARE)
        self.lost += (lost - self.lost) / _MEMORY
        if long:
            self.lost_long += (lost - self.lost_long) / (_LONG_SHARE * _MEMORY)

    def protected(self, prompt_tokens: I4) -> Bools:
        long: Bools = prompt_tokens >= self.long_tokens
        return long
