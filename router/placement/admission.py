"""Whether a request that cannot be in time is taken in all the same, or refused at once. PURE.

The forecast errs: of the requests that it gives up, LENS serves some in time after all, more than half at the edge of
capacity and next to none far beyond it. So what is refused follows what became of those
taken in, not the forecast alone.
"""

from __future__ import annotations

import numpy as np

from nexusengine.arrays import Bools
from nexusengine.router.placement.forecast import Forecast
from nexusengine.router.placement.policy import PlacementRequest
from nexusengine.scheduler.moore_hodgson import defer

_WEIGHT = 1.0 / 32.0
_HOPE, _SATURATED, _RECOVERED = 0.4, 0.1, 0.2
_FORGOTTEN_S = 60.0
_PROBE_EVERY = 16
_LATE_SHARE = 0.03
"""Of the time for prompts that late requests get beside all others; see LENS's share for aged requests."""


class Admission:
    """The share of requests predicted to be late, but taken in, whose first token came in time.

    Below a tenth the cluster is saturated, until it is a fifth again, or no request was predicted late for a minute.
    """

    def __init__(self) -> None:
        self._hope = _HOPE
        self._low = False
        self._count = 0
        self._last_s = float("-inf")

    def saturated(self, now: float) -> bool:
        """Whether requests that are predicted late are late, almost all of them."""
        return self._low and now - self._last_s < _FORGOTTEN_S

    def observe(self, in_time: bool) -> None:
        """A request that was predicted late, and taken in, has got its first token in time, or has not."""
        self._hope += _WEIGHT * (in_time - self._hope)
        self._low = self._hope < (_RECOVERED if self._low else _SATURATED)

    def refuses(self, request: PlacementRequest, late_wait_s: float, now: float) -> bool:
        """Whether to refuse a request that is predicted late everywhere.

        One in 16 is taken in, to see whether they are still late.

        Args:
            late_wait_s: seconds to its first token where it would wait least, served after all that can be in time.
        """
        if now - self._last_s >= _FORGOTTEN_S:
            self._hope, self._low = _HOPE, False
        self._last_s = now
        if not self._low or request.slo is None or late_wait_s <= request.slo.patience * request.slo.ttft_s:
            return False
        self._count += 1
        return self._count % _PROBE_EVERY != 0


def late_wait_s(forecast: Forecast, service_s: float) -> float:
    """Seconds until a request would be served that goes behind all others on a saturated worker."""
    e = forecast.estimates
    return e.rest_s + float(forecast.ahead_s[-1]) + (e.late_s + service_s) / _LATE_SHARE


def displaces(forecast: Forecast, request: PlacementRequest, service_s: float, now: float) -> bool:
    """Whether a worker that serves by deadline would serve the request in time, be it by making a longer one late.

    Args:
        service_s: seconds that its prompt keeps the worker busy.
    """
    queue = forecast.queue
    due_s = request.first_token_due_s
    place = int(np.searchsorted(queue.keys, due_s, side="right"))
    work_s = np.insert(queue.service_s, place, service_s)
    allowed_s = np.insert(queue.limit_s, place, due_s) - max(forecast.start_s, now)
    deferred: Bools = defer(work_s, allowed_s)
    return not deferred[place]
