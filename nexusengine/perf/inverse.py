"""The inverse of a predictor: how large a chunk fits into a budget of time."""

from __future__ import annotations

from collections.abc import Callable

from nexusengine.perf.features import StepFeatures


def joined(base: StepFeatures, q: int, context: int) -> StepFeatures:
    """The step `base` with one more sequence, that computes q tokens after `context` tokens in its KV cache."""
    if q == 1:
        return StepFeatures(
            base.tokens + 1,
            base.sequences + 1,
            base.prefills,
            base.prefill_attention,
            base.decode_kv_tokens + context + 1,
        )
    return StepFeatures(
        base.tokens + q,
        base.sequences + 1,
        base.prefills + 1,
        base.prefill_attention + q * (context + 0.5 * q),
        base.decode_kv_tokens,
    )


def largest(fits: Callable[[int], bool], limit: int) -> int:
    """The largest q in 1..limit that fits, 0 if none. From 2 on a step must take the longer the larger q is; q = 1
    makes a decode, which stands apart."""
    low, high = 1, limit
    while low < high:
        middle = (low + high + 1) // 2
        if fits(middle):
            low = middle
        else:
            high = middle - 1
    return low if low > 1 or (limit > 0 and fits(1)) else 0
