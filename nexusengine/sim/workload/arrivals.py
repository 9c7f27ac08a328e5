"""Arrival processes: unit-mean gaps by seed, divided by the rate, so that every rate sees the same pattern."""

from __future__ import annotations

import math

import numpy as np

from nexusengine.arrays import F8
from nexusengine.errors import ConfigError
from nexusengine.sim.workload.draw import Stream, rng_for

_CHUNK = 4096
MOST_REQUESTS = 5_000_000
"""More in one simulation are refused: they would not fit into memory or end in a day."""
LONGEST_S = 1e9
"""Longest simulated time, 31 years: beyond it float64 seconds are coarser than the steps that they time."""


def parse_arrivals(text: str) -> float | None:
    """`trace` is None; `poisson` is a coefficient of variation of 1; `gamma:CV` is CV. Raises ConfigError."""
    if text == "trace":
        return None
    if text == "poisson":
        return 1.0
    kind, _, value = text.partition(":")
    if kind == "gamma":
        try:
            cv = float(value)
        except ValueError:
            cv = math.nan
        if 0.01 <= cv <= 100:
            return cv
        raise ConfigError(f"gamma:CV wants a number between 0.01 and 100, got {text!r}", param="arrivals")
    raise ConfigError(f"arrivals are trace, poisson or gamma:CV, got {text!r}", param="arrivals")


def renewal(cv: float, rate_rps: float, duration_s: float, rng: np.random.Generator) -> F8:
    """Instants in [0, duration_s) with Gamma-distributed gaps of mean 1/rate_rps. Raises ConfigError if too many."""
    shape = 1.0 / cv**2
    chunks: list[F8] = []
    end = 0.0
    while end < duration_s * rate_rps:
        timestamps = end + np.cumsum(rng.gamma(shape, 1.0 / shape, _CHUNK))
        chunks.append(timestamps)
        end = float(timestamps[-1])
        check_count(len(chunks) * _CHUNK, rate_rps, duration_s)
    arrivals = np.concatenate(chunks) if chunks else np.zeros(0)
    kept: F8 = arrivals[arrivals < duration_s * rate_rps] / rate_rps
    return kept


def check_count(requests: float, rate_rps: float, duration_s: float) -> None:
    """Raises ConfigError if a rate over a time makes more requests than can be simulated."""
    if requests > MOST_REQUESTS:
        most = f"more than {MOST_REQUESTS} requests"
        raise ConfigError(f"{rate_rps:g} requests/s for {duration_s:g} s are {most}", param="rate")


def arrivals_of(cv: float, rate_rps: float, duration_s: float, seed: int) -> F8:
    return renewal(cv, rate_rps, duration_s, rng_for(seed, Stream.ARRIVALS))
