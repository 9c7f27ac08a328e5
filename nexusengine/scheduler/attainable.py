"""How long prompts take at the best, and whether an SLO can be met at all: for the core and for LENS alike."""

from __future__ import annotations

import numpy as np

from nexusengine.arrays import F8, Bools
from nexusengine.perf.model import Predictor


def prompts_s(
    model: Predictor,
    max_batch_tokens: int,
    tokens: F8,
    attention: F8,
    prompts: F8,
    *,
    decodes: int = 0,
    kv_tokens: float = 0.0,
) -> F8:
    """Predict how long prompts take in the largest steps there may be, each beside all decodes.

    Full steps and a last one are reckoned with, the prompts and their attention spread evenly over them.

    Returns:
        Seconds, `[N]`.
    """
    room = float(max(max_batch_tokens - decodes, 1))
    steps = np.ceil(tokens / room)
    last = tokens - (steps - 1.0) * room
    of_a_step = np.maximum(prompts / steps, 1.0)
    if not np.count_nonzero(steps > 1.0):  # as is usual
        kv = np.full(len(last), kv_tokens)
        return model.mean_s(last + decodes, of_a_step + decodes, of_a_step, last * (attention / tokens), kv)
    chunk = np.concatenate([np.full(len(tokens), room), last])
    times_s = model.mean_s(
        chunk + decodes,
        np.tile(of_a_step, 2) + decodes,
        np.tile(of_a_step, 2),
        chunk * np.tile(attention / tokens, 2),
        np.full(len(chunk), kv_tokens),
    )
    full_s, last_s = np.split(times_s, 2)
    took_s: F8 = (steps - 1.0) * full_s + last_s
    return took_s


def attainable(model: Predictor, max_batch_tokens: int, prompt_tokens: F8, ttft_s: F8, tpot_s: F8) -> Bools:
    """Whether the device, by its model, can meet SLOs of requests that have it for themselves.

    The prompt must be computed, in the largest steps there are, within ttft_s, and a decode after it within tpot_s.

    Args:
        prompt_tokens: `[N]`, those to compute, without a cached prefix; at least 1.
        ttft_s: `[N]`, or a bound of the whole response, if that is tighter. NaN bounds are met.
        tpot_s: `[N]`.

    Returns:
        Bool `[N]`.
    """
    one = np.ones(len(prompt_tokens))
    zero = np.zeros(len(prompt_tokens))
    prefill_s = prompts_s(model, max_batch_tokens, prompt_tokens, 0.5 * prompt_tokens * prompt_tokens, one)
    decode_s = model.mean_s(one, one, zero, zero, prompt_tokens + 1.0)
    met: Bools = ~((prefill_s > ttft_s) | (decode_s > tpot_s))
    return met
