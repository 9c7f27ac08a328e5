"""How far the figures of a simulation may be off: simulated again with slower and faster devices and other seeds."""

from __future__ import annotations

from dataclasses import replace
from functools import partial
from typing import Any

from nexusengine.arrays import F8, I4
from nexusengine.profiles.base import STEP_UNCERTAINTY, DeviceProfile
from nexusengine.profiles.registry import load_profile
from nexusengine.sim.api import LoadProfile, SimResult, SimSpec, simulate
from nexusengine.sim.report import rounded_numbers

OTHER_SEEDS = 2
_LATENCIES = ("ttft_ms", "tpot_ms", "e2e_ms")
_FIGURES = (
    "attainment",
    "attainment_strict",
    "attainment_longest_decile",
    "attainment_token_weighted",
    "output_tokens_per_s",
    "goodput_tokens_per_s",
)


class Slower:
    """A profile whose every step takes `factor` times as long."""

    def __init__(self, profile: DeviceProfile, factor: float) -> None:
        self._profile, self._factor = profile, factor
        self.identity = profile.identity

    def step_s(self, counts: I4, contexts: I4) -> float:
        return self._factor * self._profile.step_s(counts, contexts)

    def decode_run_s(self, contexts: I4, steps: int) -> F8:
        out: F8 = self._factor * self._profile.decode_run_s(contexts, steps)
        return out

    def noise(self, u: F8, mixed: bool) -> F8:
        return self._profile.noise(u, mixed)


def ranges(result: SimResult, *, load: LoadProfile = load_profile) -> dict[str, Any]:
    """The lowest and highest of each figure over five simulations.

    They are `result`, the same with all devices slower and faster by what their profiles may be off, and the same with
    other seeds.

    Args:
        result: of the simulation.
        load: of the profiles it was made with.

    Returns:
        `[low, high]` by the figure's name, those of latencies nested as in `SimResult.metrics`; None where no
        simulation has the figure.
    """
    spec = result.spec
    found = [result.metrics]
    found += [_metrics(spec, result, partial(_off, load, sign)) for sign in (1.0, -1.0)]
    seeds = range(spec.seed + 1, spec.seed + 1 + OTHER_SEEDS)
    found += [_metrics(replace(spec, seed=seed), result, load) for seed in seeds]
    out: dict[str, Any] = {name: _range([m[name] for m in found]) for name in _FIGURES}
    for what in _LATENCIES:
        out[what] = {key: _range([m[what][key] for m in found]) for key in result.metrics[what]}
    rounded: dict[str, Any] = rounded_numbers(out)
    return rounded


def _off(load: LoadProfile, sign: float, device: str, model: str) -> DeviceProfile:
    profile = load(device, model)
    return Slower(profile, 1.0 + sign * STEP_UNCERTAINTY[profile.identity.confidence])


def _metrics(spec: SimSpec, result: SimResult, load: LoadProfile) -> dict[str, Any]:
    return simulate(replace(spec, timeline=False), load_profile=load, builder=result.builder).metrics


def _range(values: list[float | None]) -> list[float] | None:
    known = [value for value in values if value is not None]
    return [min(known), max(known)] if known else None
