"""What serving a request on each worker costs, for policies that may choose the cheaper of equals. PURE.

What counts is the device time that comes on top. Steps serve many requests at once: a worker that decodes anyway
computes the prompt and reads some more KV tokens, an idle one has to run every step of the answer for it alone. In
between, a worker with n requests of the same length, each somewhere on its way, works on for 2 / ((n + 1) (n + 2)) of
an answer longer.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

import numpy as np

from nexusengine.arrays import F8, Bools
from nexusengine.errors import ConfigError
from nexusengine.profiles.prices import DeviceCost, cost_of
from nexusengine.router.placement.forecast_matrix import ForecastMatrix
from nexusengine.router.placement.policy import PlacementRequest, WorkerView

if TYPE_CHECKING:
    from nexusengine.router.placement.prism import PlacementCosts

_TTFT_SHARE, _TPOT_SHARE, _KV_SHARE = 0.5, 0.75, 0.8
"""Shares of the TTFT, of the tightest TPOT and of the KV cache up to which a worker counts as one with margin."""

_FEWEST_OUTPUT = 16.0
"""Tokens of an answer that are assumed of a worker that has given none yet."""


class Economy:
    """Weighs dollars and joules of device time.

    Args:
        cost: weight of dollars; energy: weight of joules; both against the dearest worker's.
        costs: of devices by name.

    Raises:
        ConfigError: a weight is negative.
    """

    def __init__(self, cost: float, energy: float, costs: Mapping[str, DeviceCost]) -> None:
        if min(cost, energy) < 0.0:
            raise ConfigError(
                f"prism: cost and energy must be at least 0, got cost={cost} and energy={energy}", param="router"
            )
        self._weights = {"cost": cost, "energy": energy}
        self._costs = costs
        self._per_second: tuple[list[str], dict[str, F8]] = ([], {})

    def penalty(self, matrix: ForecastMatrix, request: PlacementRequest, costs: PlacementCosts, feasible: Bools) -> F8:
        """What to add to the score of each worker `[W]`.

        Nothing if none has margin. Else the least on the cheapest of those that have, and the sum of the weights on the
        dearest of them and on all others.

        Args:
            costs: of the request on each worker.
            feasible: `[W]`, where it would meet its SLO.
        """
        penalty = np.zeros(len(matrix.views))
        margin = feasible & self._margin(matrix, request, costs)
        if not np.count_nonzero(margin):
            return penalty
        seconds = self._seconds(matrix, request)
        for kind, rates in self._rates(matrix.views).items():
            spent = seconds * rates
            dearest = float(spent[margin].max())
            if dearest > 0.0:
                penalty += self._weights[kind] * np.where(margin, spent / dearest, 1.0)
        return penalty

    def _margin(self, matrix: ForecastMatrix, request: PlacementRequest, costs: PlacementCosts) -> Bools:
        e, slo = matrix.estimates, request.slo
        tightest_s = e.tightest_tpot_s if slo is None else np.minimum(e.tightest_tpot_s, slo.tpot_s)
        margin = (costs.harm <= 0.0) & (costs.decode_s <= _TPOT_SHARE * tightest_s)
        margin &= e.kv_tokens + request.prompt_tokens + e.mean_output <= _KV_SHARE * e.kv_capacity
        if slo is not None:
            margin &= costs.first_token_s <= _TTFT_SHARE * slo.ttft_s
        enough: Bools = margin
        return enough

    def _seconds(self, matrix: ForecastMatrix, request: PlacementRequest) -> F8:
        """Seconds `[W]` that each worker would be busy longer."""
        e = matrix.estimates
        cached = matrix.cached_tokens(request)
        left = request.prompt_tokens - cached
        others = np.array([0.0 if view is None else view.outstanding for view in matrix.views])
        prompt_s = left * (e.chunk_token_s + e.per_pair_s * (cached + 0.5 * left))
        alone = 2.0 / ((others + 1.0) * (others + 2.0))
        output = np.maximum(e.mean_output, _FEWEST_OUTPUT)
        seconds: F8 = prompt_s + output * (e.per_kv_s * request.prompt_tokens + alone * e.decode_s)
        return seconds

    def _rates(self, views: Sequence[WorkerView | None]) -> dict[str, F8]:
        """Dollars and joules of a busy second beyond an idle one `[W]`, of those that are weighed.

        A device of which nothing is known costs as much as the dearest of the others.
        """
        devices = ["" if view is None else view.info.device for view in views]
        if devices != self._per_second[0]:
            found = [cost_of(device, self._costs) for device in devices]
            watts = [None if c.busy_w is None else c.busy_w - (c.idle_w or 0.0) for c in found]
            rates = {"cost": [c.price_per_hour for c in found], "energy": watts}
            self._per_second = devices, {kind: _filled(rates[kind]) for kind, weight in self._weights.items() if weight}
        return self._per_second[1]


def _filled(rates: Sequence[float | None]) -> F8:
    most = max((rate for rate in rates if rate is not None), default=0.0)
    return np.array([most if rate is None else rate for rate in rates])
