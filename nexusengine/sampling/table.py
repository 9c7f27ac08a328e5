"""Sampling parameters by slot, and what sampling finds beside the tokens. numpy only."""

from __future__ import annotations

from dataclasses import dataclass, fields

import numpy as np
import numpy.typing as npt

from nexusengine.arrays import I4
from nexusengine.types import SamplingParams


@dataclass(frozen=True, slots=True)
class SamplingColumns:
    """Sampling parameters as columns of one length.

    Attributes:
        temperature: f4, 0 is greedy.
        top_k: i4, 0 keeps all.
        top_p: f4.
        min_p: f4.
        seed: i8.
        logprobs: i4, how many alternatives; -1 for no log-probabilities.
    """

    temperature: npt.NDArray[np.float32]
    top_k: I4
    top_p: npt.NDArray[np.float32]
    min_p: npt.NDArray[np.float32]
    seed: npt.NDArray[np.int64]
    logprobs: I4


@dataclass(frozen=True, slots=True)
class SamplingRows(SamplingColumns):
    """The parameters of the rows to sample, `[N]`.

    Attributes:
        position: i4, the sampled token's place in its sequence.
    """

    position: I4

    def gather(self, index: npt.NDArray[np.int64]) -> SamplingRows:
        """Some of the rows, by number."""
        return SamplingRows(*(getattr(self, name)[index] for name in _COLUMNS))


_COLUMNS = tuple(field.name for field in fields(SamplingRows))


@dataclass(frozen=True, slots=True)
class SamplingTable(SamplingColumns):
    """Sampling parameters by slot, `[S]`; a slot's are filled in once, when its request arrives."""

    @classmethod
    def empty(cls, slots: int) -> SamplingTable:
        return cls(
            temperature=np.zeros(slots, np.float32),
            top_k=np.zeros(slots, np.int32),
            top_p=np.ones(slots, np.float32),
            min_p=np.zeros(slots, np.float32),
            seed=np.zeros(slots, np.int64),
            logprobs=np.full(slots, -1, np.int32),
        )

    def set(self, slot: int, params: SamplingParams) -> None:
        """Fill in a slot.

        Raises:
            ValueError: the seed was not filled in (see SamplingParams.with_seed).
        """
        if params.seed is None:
            raise ValueError("a seed must be drawn before a request reaches the engine core")
        self.temperature[slot] = params.temperature
        self.top_k[slot] = params.top_k
        self.top_p[slot] = params.top_p
        self.min_p[slot] = params.min_p
        self.seed[slot] = params.seed
        self.logprobs[slot] = -1 if params.logprobs is None else params.logprobs

    def rows(self, slots: I4, positions: I4) -> SamplingRows:
        """The parameters of the rows to sample.

        Args:
            slots: `[N]`, of the rows.
            positions: `[N]`, each sampled token's place in its sequence.
        """
        return SamplingRows(
            self.temperature[slots],
            self.top_k[slots],
            self.top_p[slots],
            self.min_p[slots],
            self.seed[slots],
            self.logprobs[slots],
            positions,
        )


@dataclass(frozen=True, slots=True)
class SampledLogprobs:
    """Log-probabilities of a step's sampled rows.

    Attributes:
        chosen: f4 `[N]`, of each row's token.
        top_ids: i4 `[N, k]`, the k most likely tokens; k: the most alternatives that any row asked for.
        top: f4 `[N, k]`, of those.
    """

    chosen: npt.NDArray[np.float32]
    top_ids: I4
    top: npt.NDArray[np.float32]
