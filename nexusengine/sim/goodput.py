"""Goodput: the highest offered rate at which promises are kept, by bracketing and bisection.

The rule: a rate holds if at least `target` of all offered requests meet their SLO AND at least `longest_decile` of the
tenth with the longest prompts do (means over the seeds). Goodput is the highest rate tried that holds, with none among
those tried below it that does not. So where attainment rises again after a fall, only what lies before the fall counts.
From a first rate the search doubles until a rate does not hold (or halves until one does; in smaller steps at first
where that rate is a good guess), then bisects until the two ends of the bracket differ by less than `precision` of the
lower; the lower one is the answer. All rates of a seed see the same lengths and the same pattern of arrivals, faster or
slower.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from nexusengine.errors import ConfigError
from nexusengine.sim.api import LoadProfile, SimSpec, parse_devices, simulate
from nexusengine.sim.cluster import Outcome
from nexusengine.sim.verdicts import longest_tenth, verdict
from nexusengine.sim.workload.build import Builder, Workload

_FEWEST_REQUESTS = 20
_MOST_DOUBLINGS = 16


@dataclass(frozen=True, slots=True)
class Tried:
    """A rate and what came of it.

    Attributes:
        cut_short: it was given up as soon as it could no longer hold, so that the two shares are upper bounds.
    """

    rate_rps: float
    attainment: float
    longest_decile: float
    holds: bool
    cut_short: bool


@dataclass(frozen=True, slots=True)
class Goodput:
    """metrics: of the first seed at the goodput, {} if there is none."""

    rate_rps: float
    tried: tuple[Tried, ...]
    metrics: dict[str, Any]


class _Budget:
    """How many requests may miss before a rate can no longer hold; asked after the end of each."""

    def __init__(self, workload: Workload, needed: float, needed_longest: float) -> None:
        prompts = [job.prompt_tokens for job in workload.jobs]
        longest = longest_tenth(np.array(prompts)).tolist()
        self._closed_loop = any(job.then is not None for job in workload.jobs)
        self._longest = {workload.jobs[i].request.request_id for i in longest}
        self._left = len(prompts) * (1.0 - needed)
        self._left_longest = len(longest) * (1.0 - needed_longest)

    def enough(self, outcome: Outcome) -> bool:
        if self._closed_loop or verdict(outcome).met:
            return False
        self._left -= 1
        self._left_longest -= outcome.job.request.request_id in self._longest
        return self._left < -1e-6 or self._left_longest < -1e-6

    def best_possible(self, workload: Workload, needed: float, needed_longest: float) -> tuple[float, float]:
        """Attainments if nothing misses any more."""
        n = len(workload.jobs)
        return (
            needed + self._left / n,
            needed_longest + self._left_longest / len(self._longest),
        )


def goodput(
    spec: SimSpec,
    *,
    target: float = 0.9,
    longest_decile: float = 0.75,
    seeds: Sequence[int] | None = None,
    precision: float = 0.02,
    first_rate_rps: float | None = None,
    growth: float = 2.0,
    load_profile: LoadProfile | None = None,
    progress: Callable[[Tried], None] = lambda tried: None,
) -> Goodput:
    """Search for the highest rate that holds.

    Args:
        first_rate_rps: where to begin; by default half a request a second and device.
        growth: the first factor, 1.1 say where that rate is a good guess; each further one is the square of the one
            before, at most 2.

    Raises:
        ConfigError: something is wrong with the specification.
    """
    for name, share in (("target", target), ("longest_decile", longest_decile)):
        if not 0.0 <= share <= 1.0:
            raise ConfigError(f"{name} must be between 0 and 1, got {share}", param=name)
    if not 0.001 <= precision <= 0.5:
        raise ConfigError(f"precision must be between 0.001 and 0.5, got {precision}", param="precision")
    if not 1.01 <= growth <= 2.0:
        raise ConfigError(f"growth must be between 1.01 and 2, got {growth}", param="growth")
    if first_rate_rps is not None and not (math.isfinite(first_rate_rps) and first_rate_rps > 0):
        raise ConfigError(f"first_rate must be a number above 0, got {first_rate_rps}", param="first_rate")
    search = _Search(spec, target, longest_decile, seeds or [spec.seed], load_profile, progress)
    rate = 0.5 * len(parse_devices(spec.devices)) if first_rate_rps is None else first_rate_rps
    lowest = _FEWEST_REQUESTS / (spec.duration_s or 600.0)
    low = high = 0.0
    while low == 0.0 or high == 0.0:
        if search.holds(rate):
            low, rate = rate, growth * rate
        else:
            high, rate = rate, rate / growth
            if low == 0.0 and rate < lowest:
                return Goodput(0.0, tuple(search.tried), {})
        growth = min(growth * growth, 2.0)
        if len(search.tried) > _MOST_DOUBLINGS:
            raise ConfigError(f"{rate:g} requests/s still hold; the search began too low", param="rate")
    while high - low > precision * low:
        middle = 0.5 * (low + high)
        if search.holds(middle):
            low = middle
        else:
            high = middle
    return Goodput(low, tuple(search.tried), search.metrics[low])


class _Search:
    def __init__(
        self,
        spec: SimSpec,
        target: float,
        longest_decile: float,
        seeds: Sequence[int],
        load_profile: LoadProfile | None,
        progress: Callable[[Tried], None],
    ) -> None:
        self._spec, self._target, self._longest, self._seeds = spec, target, longest_decile, seeds
        self._load_profile, self._progress = load_profile, progress
        self._builder: Builder | None = None
        self.tried: list[Tried] = []
        self.metrics: dict[float, dict[str, Any]] = {}

    def holds(self, rate_rps: float) -> bool:
        """Seed after seed; given up when even the best of all ends of the others would not do."""
        met = met_longest = 0.0
        cut_short = False
        seeds = len(self._seeds)
        for done, seed in enumerate(self._seeds):
            needed = max(seeds * self._target - met - (seeds - done - 1), 0.0)
            needed_longest = max(seeds * self._longest - met_longest - (seeds - done - 1), 0.0)
            spec = replace(self._spec, rate_rps=rate_rps, seed=seed)
            metrics, best = self._simulate(spec, needed, needed_longest)
            if best is not None:
                met, met_longest, cut_short = met + best[0] + seeds - done - 1, met_longest + best[1], True
                met_longest += seeds - done - 1
                break
            met += metrics["attainment"]
            met_longest += metrics["attainment_longest_decile"]
            if done == 0:
                self.metrics[rate_rps] = metrics
        holds = not cut_short and met >= seeds * self._target - 1e-9 and met_longest >= seeds * self._longest - 1e-9
        tried = Tried(rate_rps, met / seeds, met_longest / seeds, holds, cut_short)
        self.tried.append(tried)
        self._progress(tried)
        return holds

    def _simulate(
        self, spec: SimSpec, needed: float, needed_longest: float
    ) -> tuple[dict[str, Any], tuple[float, float] | None]:
        """The metrics; and the best possible attainments if it was cut short."""
        budgets: list[tuple[_Budget, Workload]] = []

        def enough_of(workload: Workload) -> Callable[[Outcome], bool]:
            budgets.append((_Budget(workload, needed, needed_longest), workload))
            return budgets[0][0].enough

        result = simulate(spec, load_profile=self._load_profile, builder=self._builder, enough_of=enough_of)
        self._builder = self._builder or result.builder
        if not result.metrics["stopped_early"]:
            return result.metrics, None
        budget, workload = budgets[0]
        return result.metrics, budget.best_possible(workload, needed, needed_longest)
