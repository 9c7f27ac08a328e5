"""PRISM that weighs energy, on simulated devices: the same promises kept, for less."""

from __future__ import annotations

import pytest

from nexusengine.profiles.prices import DEVICE_COSTS
from nexusengine.sim.api import SimSpec, parse_devices, simulate
from nexusengine.sim.costs import Costs, costs_of

DEVICES = "h100,l40s,l4"


def run(router: str) -> tuple[float, Costs]:
    spec = SimSpec(
        trace="lengths:input=200..1800,output=20..200",
        devices=DEVICES,
        arrivals="poisson",
        rate_rps=12.0,
        duration_s=12.0,
        classes="mixed",
        router=router,
        seed=1,
    )
    metrics = simulate(spec).metrics
    return metrics["attainment"], costs_of(metrics, parse_devices(DEVICES), DEVICE_COSTS)


@pytest.mark.parametrize("router", ["prism:energy=1", "prism:cost=1"])
def test_as_many_promises_are_kept_for_less(router: str) -> None:
    (before, usual), (after, economic) = run("prism"), run(router)
    assert after >= before - 0.005
    assert usual.joules_per_kept is not None
    assert economic.joules_per_kept is not None
    assert economic.joules_per_kept < 0.9 * usual.joules_per_kept
    assert (economic.usd_per_kept or 0.0) < 0.9 * (usual.usd_per_kept or 0.0)
