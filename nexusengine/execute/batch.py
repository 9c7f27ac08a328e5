"""What an executor is given: one flat batch of tokens, and tables indexed by slot. numpy only.

Nothing here is per token in Python: the engine core fills arrays, the executor uploads them.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from nexusengine.types import SamplingParams

I4 = npt.NDArray[np.int32]
PENDING = -1
"""Stands in StepBatch.token_ids for the token that the slot sampled last, which is known to the device alone."""


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
class StepBatch:
    """One step's work. R rows (sequences), T tokens; rows that compute one token come first.

    slots     i4 [R]  row of the tables below
    starts    i4 [R]  tokens of the sequence already in the KV cache
    counts    i4 [R]  tokens computed now; the sequence then has starts + counts tokens in the cache
    sampled   bool [R]  rows whose last token's logits are sampled; a sampled token's place in its sequence is
                        starts + counts, which with the seed alone determines its random draw
    token_ids i4 [T]  input tokens, row after row; PENDING stands for the token this slot sampled last
    block_tables i4 [S, B]  KV blocks of each slot, in order; 0 is the null block. Shared, not a copy: valid during the
                        step only.
    sampling  columns by slot
    """

    slots: I4
    starts: I4
    counts: I4
    sampled: npt.NDArray[np.bool_]
    token_ids: I4
    block_tables: I4
    sampling: SamplingTable


@dataclass(frozen=True, slots=True)
class SampledLogprobs:
    """For the sampled rows N of a step: the chosen token's log-probability f4 `[N]` and, where any row asked for
    alternatives, ids i4 `[N, k]` and log-probabilities f4 `[N, k]` of the k most likely (k = the most asked for)."""

    chosen: npt.NDArray[np.float32]
    top_ids: I4
    top: npt.NDArray[np.float32]


@dataclass(frozen=True, slots=True)
class StepResult:
    """token_ids i4 `[N]`: one for each sampled row, in row order; -1 where the logits were not finite (that request
    fails, no other). logprobs: present if any sampled row asked. device_s: seconds the device worked on the step."""

    token_ids: I4
    device_s: float
    logprobs: SampledLogprobs | None = None
