"""Sampling parameters by slot, and what sampling finds beside the tokens. numpy only."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from nexusengine.arrays import I4
from nexusengine.types import SamplingParams


@dataclass(frozen=True, slots=True)
class SamplingTable:
    """Sampling parameters as columns by slot `[S]`; filled once when a request arrives.

    temperature f4 (0 is greedy), top_k i4 (0 keeps all), top_p f4, min_p f4, seed i8, logprobs i4 (-1 for none).
    """

    temperature: npt.NDArray[np.float32]
    top_k: I4
    top_p: npt.NDArray[np.float32]
    min_p: npt.NDArray[np.float32]
    seed: npt.NDArray[np.int64]
    logprobs: I4

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
        """Raises ValueError if the seed was not filled in (see SamplingParams.with_seed)."""
        if params.seed is None:
            raise ValueError("a seed must be drawn before a request reaches the engine core")
        self.temperature[slot] = params.temperature
        self.top_k[slot] = params.top_k
        self.top_p[slot] = params.top_p
        self.min_p[slot] = params.min_p
        self.seed[slot] = params.seed
        self.logprobs[slot] = -1 if params.logprobs is None else params.logprobs


@dataclass(frozen=True, slots=True)
class SampledLogprobs:
    """For the sampled rows N of a step: the chosen token's log-probability f4 `[N]` and, where any row asked for
    alternatives, ids i4 `[N, k]` and log-probabilities f4 `[N, k]` of the k most likely (k = the most asked for)."""

    chosen: npt.NDArray[np.float32]
    top_ids: I4
    top: npt.NDArray[np.float32]
