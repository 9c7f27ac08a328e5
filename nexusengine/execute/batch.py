"""What an executor is given: one flat batch of tokens, and tables indexed by slot. numpy only.

Nothing here is per token in Python: the engine core fills arrays, the executor uploads them.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from nexusengine.arrays import I4
from nexusengine.sampling.table import SampledLogprobs, SamplingTable

PENDING = -1
"""Stands in StepBatch.token_ids for the token that the slot sampled last, which is known to the device alone."""


@dataclass(frozen=True, slots=True)
class StepBatch:
    """One step's work: R rows (sequences), T tokens; rows that compute one token come first.

    Attributes:
        slots: i4 `[R]`, row of the tables below.
        starts: i4 `[R]`, tokens of the sequence already in the KV cache.
        counts: i4 `[R]`, tokens computed now; the sequence then has starts + counts tokens in the cache.
        sampled: bool `[R]`, rows whose last token's logits are sampled; a sampled token's place in its sequence is
            starts + counts, which with the seed alone determines its random draw.
        token_ids: i4 `[T]`, input tokens, row after row; PENDING stands for the token this slot sampled last.
        block_tables: i4 `[S, B]`, KV blocks of each slot, in order; 0 is the null block. Shared, not a copy: valid
            during the step only.
        sampling: columns by slot.
        releases: i8 `[S]`, how often each slot was released; in between, blocks are only added behind those that its
            table has. Shared as `block_tables` is. None: not known, tables may have changed in any way.
    """

    slots: I4
    starts: I4
    counts: I4
    sampled: npt.NDArray[np.bool_]
    token_ids: I4
    block_tables: I4
    sampling: SamplingTable
    releases: npt.NDArray[np.int64] | None = None


@dataclass(frozen=True, slots=True)
class StepResult:
    """The tokens that a step sampled.

    Attributes:
        token_ids: i4 `[N]`, one for each sampled row, in row order; -1 where the logits were not finite (that request
            fails, no other).
        device_s: seconds the device worked on the step.
        logprobs: present if any sampled row asked.
        idle_s: seconds that the device had no step to work on before this one, 0 where it is not known.
    """

    token_ids: I4
    device_s: float
    logprobs: SampledLogprobs | None = None
    idle_s: float = 0.0
