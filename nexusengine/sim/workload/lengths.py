"""Lengths from distributions: `lengths:input=DIST,output=DIST`.

DIST is one of `512` (always), `100..2000` (uniform), `exp:MEAN` (exponential), `logn:MEDIAN:P90` (log-normal by its
median and its 90th percentile). All are rounded to whole tokens, at least 1.
"""

from __future__ import annotations

import math
from collections.abc import Callable

import numpy as np

from nexusengine.arrays import I8
from nexusengine.errors import ConfigError
from nexusengine.sim.workload.draw import Drawn, Stream, rng_for

PREFIX = "lengths:"
_Z90 = 1.2815515655446004
Sampler = Callable[[np.random.Generator, int], np.ndarray]


class Synthetic:
    """Source of made-up lengths."""

    rate_rps = None

    def __init__(self, spec: str) -> None:
        """Raises ConfigError with what is wrong with the words behind `lengths:`."""
        self.name = spec
        parts: dict[str, str] = {}
        for item in spec.removeprefix(PREFIX).split(","):
            key, _, value = item.partition("=")
            parts[key.strip()] = value.strip()
        if set(parts) != {"input", "output"}:
            raise ConfigError(f"{spec!r} is not of the form lengths:input=DIST,output=DIST", param="trace")
        self._input, self._output = _sampler(parts["input"], spec), _sampler(parts["output"], spec)

    def lengths(self, count: int, seed: int) -> Drawn:
        inputs = _whole(self._input(rng_for(seed, Stream.LENGTHS, 0), count))
        outputs = _whole(self._output(rng_for(seed, Stream.LENGTHS, 1), count))
        return Drawn(np.zeros(count), inputs, outputs)

    def with_arrivals(self, rate_rps: float | None, duration_s: float | None, seed: int) -> Drawn:
        raise ConfigError(f"{self.name} has no arrival times: give --arrivals poisson or gamma:CV", param="arrivals")


def _whole(values: np.ndarray) -> I8:
    whole: I8 = np.clip(np.rint(values), 1, 10**9).astype(np.int64)
    return whole


def _sampler(text: str, spec: str) -> Sampler:
    kind, *words = text.split(":") if ":" in text else ("", *text.split(".."))
    try:
        numbers = [float(w) for w in words]
    except ValueError:
        numbers = []
    if not numbers or not all(math.isfinite(n) and n >= 1 for n in numbers):
        numbers = []
    if kind == "" and len(numbers) == 1:
        return lambda rng, count: np.full(count, numbers[0])
    if kind == "" and len(numbers) == 2 and numbers[0] <= numbers[1]:
        return lambda rng, count: rng.uniform(numbers[0] - 0.499, numbers[1] + 0.499, count)
    if kind == "exp" and len(numbers) == 1:
        return lambda rng, count: rng.exponential(numbers[0], count)
    if kind == "logn" and len(numbers) == 2 and numbers[0] <= numbers[1]:
        sigma = math.log(numbers[1] / numbers[0]) / _Z90
        return lambda rng, count: rng.lognormal(math.log(numbers[0]), sigma, count)
    raise ConfigError(
        f"{text!r} in {spec!r} is not N, LOW..HIGH, exp:MEAN or logn:MEDIAN:P90 with numbers >= 1", param="trace"
    )
