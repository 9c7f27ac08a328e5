"""What a simulated cluster costs: money by the hour, energy by what its devices did.

Hours and idle power are those of the time in which requests arrive, steps count whenever they run: what the last
answers take after that is not charged, so that a short simulation says what a long one would.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from nexusengine.profiles.prices import DeviceCost, cost_of


@dataclass(frozen=True, slots=True)
class Costs:
    """Of a cluster under a load; None where the costs of one of its devices are not known, or nothing came of it.

    Attributes:
        price_per_hour: US dollars for all devices, busy or not.
        usd_per_million_tokens: output tokens, at that price.
        usd_per_kept: for each request that met its SLO, if only busy time were paid for.
        power_w: mean power of all devices.
        joules_per_token: for each output token, idle power included.
        joules_per_kept: for each request that met its SLO, idle power included.
    """

    price_per_hour: float | None = None
    usd_per_million_tokens: float | None = None
    usd_per_kept: float | None = None
    power_w: float | None = None
    joules_per_token: float | None = None
    joules_per_kept: float | None = None


NO_COSTS = Costs()


def costs_of(metrics: Mapping[str, Any], devices: Sequence[str], costs: Mapping[str, DeviceCost]) -> Costs:
    """Costs of a simulation.

    Args:
        metrics: of sim.report.
        devices: one name a worker, in the order of metrics["workers"].
        costs: of devices by name.
    """
    found = [cost_of(device, costs) for device in devices]
    seconds = float(metrics["offered"]) / float(metrics["offered_rps"] or math.nan)
    busy = [float(worker["busy"] or 0.0) * float(metrics["simulated_s"]) / seconds for worker in metrics["workers"]]
    tokens = float(sum(worker["generated_tokens"] for worker in metrics["workers"]))
    kept = float(metrics["attainment"]) * float(metrics["offered"])
    price = _sum(c.price_per_hour for c in found)
    busy_price = _sum(
        None if c.price_per_hour is None else b * c.price_per_hour for b, c in zip(busy, found, strict=True)
    )
    power_w = _sum(
        None if c.idle_w is None or c.busy_w is None else c.idle_w + b * (c.busy_w - c.idle_w)
        for b, c in zip(busy, found, strict=True)
    )
    return Costs(
        price_per_hour=price,
        usd_per_million_tokens=_per(price, 1e6 * seconds / 3600, tokens),
        usd_per_kept=_per(busy_price, seconds / 3600, kept),
        power_w=power_w,
        joules_per_token=_per(power_w, seconds, tokens),
        joules_per_kept=_per(power_w, seconds, kept),
    )


def _sum(values: Any) -> float | None:
    found = list(values)
    return None if None in found else float(sum(found))


def _per(value: float | None, factor: float, count: float) -> float | None:
    return value * factor / count if value is not None and count > 0.0 and math.isfinite(factor) else None
