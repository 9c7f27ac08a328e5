"""What a step's duration depends on: the features of LENS' performance model."""

from __future__ import annotations

import math
from typing import NamedTuple

import numpy as np
import numpy.typing as npt

SHORTEST_S, LONGEST_S = 1e-6, 1e4


class StepFeatures(NamedTuple):
    """A step's composition.

    Attributes:
        tokens: T, tokens computed.
        sequences: n.
        prefills: sequences that compute more than one token.
        prefill_attention: A, the sum over prefill chunks of q * (ctx + q / 2), in token pairs.
        decode_kv_tokens: K, KV tokens read by the sequences that compute one token.
    """

    tokens: int
    sequences: int
    prefills: int = 0
    prefill_attention: float = 0.0
    decode_kv_tokens: int = 0

    @classmethod
    def of(cls, counts: npt.NDArray[np.int32], contexts: npt.NDArray[np.int32]) -> StepFeatures:
        """From tokens computed `counts [R]` and tokens already in the KV cache `contexts [R]`, row by row."""
        rows, tokens = len(counts), int(counts.sum())
        kv_tokens = int(contexts.sum()) + rows
        if tokens == rows:
            return cls(tokens, rows, 0, 0.0, kv_tokens)
        chunk = counts > 1
        q, ctx = counts[chunk].astype(np.float64), contexts[chunk].astype(np.float64)
        return cls(
            tokens=tokens,
            sequences=rows,
            prefills=len(q),
            prefill_attention=float((q * (ctx + 0.5 * q)).sum()),
            decode_kv_tokens=kv_tokens - int(ctx.sum()) - len(q),
        )

    def with_prefill(self, tokens: int, context: int) -> StepFeatures:
        """This step with one more sequence that prefills `tokens` tokens after `context` tokens in its KV cache."""
        return StepFeatures(
            self.tokens + tokens,
            self.sequences + 1,
            self.prefills + 1,
            self.prefill_attention + tokens * (context + 0.5 * tokens),
            self.decode_kv_tokens,
        )

    def with_chunk(self, tokens: int, context: int) -> StepFeatures:
        """As `with_prefill`; one token alone counts as a decode, which it is to the device."""
        if tokens != 1:
            return self.with_prefill(tokens, context)
        return StepFeatures(
            self.tokens + 1,
            self.sequences + 1,
            self.prefills,
            self.prefill_attention,
            self.decode_kv_tokens + context + 1,
        )


def duration(seconds: float) -> float | None:
    """The seconds a model learns from, within 1 microsecond and 10,000 seconds; None for what is no duration."""
    if not (math.isfinite(seconds) and seconds > 0.0):
        return None
    return min(max(seconds, SHORTEST_S), LONGEST_S)
