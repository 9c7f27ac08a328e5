"""What a workload is drawn from, and the random streams it is drawn with."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from enum import IntEnum
from typing import Protocol

import numpy as np

from nexusengine.arrays import F8, I8
from nexusengine.sim.workload.entries import Entry


class Stream(IntEnum):
    """What a random stream is for. One stream's use never moves another's."""

    ARRIVALS = 0
    LENGTHS = 1
    CLASSES = 2
    NOISE = 3
    LOSS = 4


def rng_for(seed: int, stream: Stream, *keys: int) -> np.random.Generator:
    """An independent generator for each (seed, stream, keys)."""
    return np.random.default_rng(np.random.SeedSequence(seed, spawn_key=(int(stream), *keys)))


@dataclass(frozen=True, slots=True)
class Drawn:
    """Requests in order of arrival: timestamps from 0, lengths in tokens, all `[N]`.

    Attributes:
        blocks: ids of the prompts' blocks of `block_tokens` tokens, or None.
        entries: what was recorded of each beside its lengths, or None.
    """

    arrival_s: F8
    input_tokens: I8
    output_tokens: I8
    blocks: Sequence[Sequence[int]] | None = None
    block_tokens: int = 0
    entries: Sequence[Entry] | None = None


class Source(Protocol):
    """Where lengths come from, and arrivals with them where the source has some."""

    @property
    def name(self) -> str: ...

    @property
    def rate_rps(self) -> float | None:
        """The source's own mean rate of arrivals; None if it has none."""
        ...

    def lengths(self, count: int, seed: int) -> Drawn:
        """The first `count` requests, with arrivals of 0: the same ones for every count and rate."""
        ...

    def with_arrivals(self, rate_rps: float | None, duration_s: float | None, seed: int) -> Drawn:
        """The source's own arrivals, their time scaled to a mean rate. Raises ConfigError if it has none."""
        ...
