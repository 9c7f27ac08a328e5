"""Many simulations of one specification: every engine policy with every router policy at every rate and seed."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass, replace
from typing import Any

from nexusengine.sim.api import SimSpec, simulate
from nexusengine.sim.workload.build import Builder


@dataclass(frozen=True, slots=True)
class Point:
    """One simulation of a sweep, and its metrics."""

    engine: str
    router: str
    rate_rps: float
    seed: int
    metrics: dict[str, Any]


def specs_of(
    spec: SimSpec, engines: Sequence[str], routers: Sequence[str], rates: Sequence[float], seeds: Sequence[int]
) -> list[SimSpec]:
    return [
        replace(spec, engine=engine, router=router, rate_rps=rate, seed=seed)
        for engine, router, rate, seed in itertools.product(engines, routers, rates, seeds)
    ]


def sweep(specs: Sequence[SimSpec], jobs: int = 1, progress: Callable[[Point], None] = lambda p: None) -> list[Point]:
    """In the order of `specs`, with `jobs` processes."""
    points: list[Point] = []
    if jobs <= 1:
        for spec in specs:
            points.append(_one(spec))
            progress(points[-1])
        return points
    with ProcessPoolExecutor(jobs) as pool:
        for point in pool.map(_one, specs):
            points.append(point)
            progress(point)
    return points


_builder: Builder | None = None  # of this process: most points of a sweep share a trace


def _one(spec: SimSpec) -> Point:
    global _builder
    result = simulate(spec, builder=_builder)
    _builder = result.builder
    return Point(spec.engine, spec.router, spec.rate_rps or 0.0, spec.seed, result.metrics)
