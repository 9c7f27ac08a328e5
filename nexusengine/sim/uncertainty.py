"""How far the figures of a replay may be off, from what is known of the errors of its parts.

The run is simulated again with one part at a time changed by its own uncertainty; the shifts of a figure are added as
squares, because the parts err independently. That is a standard deviation, not a bound: a third of all figures may be
further off.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace

import numpy as np

from nexusengine.profiles.base import STEP_UNCERTAINTY, Confidence, DeviceProfile
from nexusengine.profiles.composed import ComposedProfile
from nexusengine.sim.replay import Replayed, figures, replay
from nexusengine.sim.vllm_run import Sent, VllmSettings
from nexusengine.sim.vllm_steps import AS_MEASURED, Factors

ATTENTION: dict[Confidence, float] = {"measured": 0.05, "composed": 0.1, "resampled": 0.03, "roofline": 0.3}
"""Interpolation is 1.3 % off in the median, and half of what unequal contexts cost is doubtful."""

EXCHANGE, HOST_SHARE, BEYOND, KV = 0.1, 1.0, 0.2, 0.03
"""Collectives: repeats differ by 3 %, hosts by more. What vLLM adds to kernels: all of it. Kernels beyond what was
measured: where a table ends, the last segments' slopes differ by that. KV capacity, where the run does not say it."""

SEEDS = 3
"""Replays with scattered steps."""


@dataclass(frozen=True, slots=True)
class Doubt:
    """A part of the simulation, changed by its uncertainty."""

    name: str
    factors: Factors
    settings: VllmSettings


def doubts(profile: DeviceProfile, sent: Sequence[Sent], settings: VllmSettings) -> Iterator[Doubt]:
    """The parts that this run has."""
    level = profile.identity.confidence
    yield Doubt("kernels", Factors(dense=1.0 + STEP_UNCERTAINTY[level]), settings)
    if isinstance(profile, ComposedProfile):
        yield Doubt("attention", Factors(attention=1.0 + ATTENTION[level]), settings)
        if profile.experts is not None and settings.data_parallel_size > 1:
            yield Doubt("exchange", Factors(exchange=1.0 + EXCHANGE), settings)
        if _may_go_beyond(profile, sent, settings):
            yield Doubt("beyond the tables", Factors(beyond=1.0 + BEYOND), settings)
    yield Doubt("host", Factors(host=1.0 + HOST_SHARE), settings)
    if settings.kv_tokens is None:
        fewer = int(profile.identity.kv_capacity_tokens * (1.0 - KV))
        yield Doubt("KV capacity", AS_MEASURED, replace(settings, kv_tokens=fewer))


def uncertainty(
    profile: DeviceProfile, sent: Sequence[Sent], settings: VllmSettings, base: Replayed
) -> dict[str, dict[str, float]]:
    """What each doubt and the scatter of steps do to each figure, and all together.

    Args:
        profile, sent, settings: as they were replayed.
        base: the replay.

    Returns:
        By figure (see `figures`), in percent of it: a shift by the name of each doubt, signed, `scatter`, and `all`.
    """
    middle = figures(base.simulated)
    shifts: dict[str, dict[str, float]] = {name: {} for name in middle}
    for doubt in doubts(profile, sent, settings):
        moved = figures(replay(profile, sent, doubt.settings, factors=doubt.factors).simulated)
        for name, value in middle.items():
            shifts[name][doubt.name] = 100.0 * (moved[name] / value - 1.0)
    scattered = [
        figures(replay(profile, sent, settings, scatter=np.random.default_rng(seed)).simulated) for seed in range(SEEDS)
    ]
    for name, value in middle.items():
        off = [100.0 * (one[name] / value - 1.0) for one in scattered]
        shifts[name]["scatter"] = float(np.sqrt(np.mean(np.square(off))))
        shifts[name]["all"] = float(np.sqrt(sum(shift**2 for shift in shifts[name].values())))
    return {name: {doubt: round(shift, 2) for doubt, shift in of.items()} for name, of in shifts.items()}


def _may_go_beyond(profile: ComposedProfile, sent: Sequence[Sent], settings: VllmSettings) -> bool:
    most = profile.measured
    return (
        settings.max_num_batched_tokens > most.tokens
        or min(settings.max_num_seqs, len(sent)) > most.sequences
        or max(s.input_tokens + s.output_tokens for s in sent) > most.context
    )
