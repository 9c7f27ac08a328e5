"""How long a step of a replayed vLLM run takes: kernels from the profile, and what vLLM adds to them.

- A step whose tokens fit a captured CUDA graph computes as many rows as the graph has; attention and the output head
  know the real ones. Data-parallel engines with experts agree on one graph.
- With experts, data-parallel engines step together: each layer waits for the slowest, gathers and scatters the
  activations, and computes the experts for the tokens of all. Collectives were measured with equal parts on both
  devices; of unequal parts the total counts.
- A step with a prompt chunk runs outside the one CUDA graph of decode steps, and its matrix products at the clocks of
  sustained load instead of a burst's. Both are small; see HOST.
"""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np

from nexusengine.arrays import I4
from nexusengine.profiles.base import DeviceProfile
from nexusengine.profiles.composed import ComposedProfile
from nexusengine.profiles.links import Link

Batch = tuple[I4, I4]
"""Counts and contexts of a step, row by row."""

StepCost = Callable[[list[Batch]], float]
"""Seconds of a step that these batches make together."""


@dataclass(frozen=True, slots=True)
class Host:
    """What a step with a prompt chunk takes beyond its kernels one by one: launch_s, and a factor."""

    launch_s: float
    sustained: float


HOST = Host(0.001, 1.02)
"""Estimated from the 300-request run of Llama-3.1-8B on the RTX PRO 6000 (docs/profiles.md), used for all."""


@dataclass(frozen=True, slots=True)
class Factors:
    """Factors on the parts of a step, to see what an error in one of them does to the whole.

    Attributes:
        dense: everything that depends on the number of tokens alone, experts included; all of a profile without parts.
        attention: of all layers.
        exchange: between devices.
        host: what vLLM adds to the kernels.
        beyond: on kernels of a step beyond what was measured.
    """

    dense: float = 1.0
    attention: float = 1.0
    exchange: float = 1.0
    host: float = 1.0
    beyond: float = 1.0


AS_MEASURED = Factors()


def step_cost(
    profile: DeviceProfile,
    *,
    engines: int = 1,
    link: Link | None = None,
    host: Host = HOST,
    graphs: Sequence[int] = (),
    factors: Factors = AS_MEASURED,
    scatter: np.random.Generator | None = None,
) -> StepCost:
    """Make the function that says how long a step of `engines` together takes; some may have nothing to do.

    Args:
        profile: of one engine's device; with parts where there are several engines or graphs.
        engines: that step together; more than one only with experts and a link.
        link: between them.
        host: what vLLM adds to the kernels.
        graphs: token counts of the captured CUDA graphs, increasing.
        factors: on the parts of a step.
        scatter: draws each step's deviation as it was measured; None for the mean.
    """
    if isinstance(profile, ComposedProfile):
        kernels = _of_parts(profile, engines, link, graphs, factors)
    else:
        kernels = _as_a_whole(profile, factors)

    def cost(batches: list[Batch]) -> float:
        mixed = any(int(counts.max()) > 1 for counts, _ in batches)
        seconds = kernels(batches)
        if scatter is not None:
            seconds *= float(profile.noise(scatter.random(1), mixed)[0])
        if not mixed:
            return seconds
        return seconds * (1.0 + (host.sustained - 1.0) * factors.host) + host.launch_s * factors.host

    return cost


def graph_rows(tokens: int, graphs: Sequence[int]) -> int:
    """Rows of the smallest graph that has room for `tokens`; `tokens` itself where none has."""
    at = bisect_left(graphs, tokens)
    return graphs[at] if at < len(graphs) else tokens


def _as_a_whole(profile: DeviceProfile, factors: Factors) -> StepCost:
    def kernels(batches: list[Batch]) -> float:
        counts, contexts = batches[0]
        return factors.dense * profile.step_s(counts, contexts)

    return kernels


def _of_parts(
    profile: ComposedProfile, engines: int, link: Link | None, graphs: Sequence[int], factors: Factors
) -> StepCost:
    experts = None if profile.experts is None else profile.experts.seconds(engines)

    def rows_of(sizes: list[int]) -> list[int]:
        """Of every engine, those with nothing to do included: they compute one row, or the others' graph."""
        if graphs and max(sizes) <= graphs[-1]:
            return [graph_rows(max(sizes), graphs)] * engines
        return sizes + [1] * (engines - len(sizes))

    def kernels(batches: list[Batch]) -> float:
        sizes = [int(counts.sum()) for counts, _ in batches]
        rows = rows_of(sizes)
        own = max(
            factors.dense * (profile.dense(computed) + profile.head(len(counts)))
            + factors.attention * profile.attention_s(counts, contexts, size)
            for computed, size, (counts, contexts) in zip(rows, sizes, batches, strict=False)
        )
        if experts is not None:
            own += factors.dense * experts(sum(rows))
        if factors.beyond != 1.0 and any(profile.beyond_measured(*batch) for batch in batches):
            own *= factors.beyond
        if engines == 1:
            return own
        assert link is not None
        part = 2 * profile.hidden * sum(rows) / engines
        exchange = profile.layers * float(link.all_gather_s(part) + link.reduce_scatter_s(part))
        return own + factors.exchange * exchange

    return kernels
