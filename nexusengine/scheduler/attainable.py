"""How long prompts take at the best, and whether an SLO can be met at all: for the core and for LENS alike."""

from __future__ import annotations

import numpy as np

from nexusengine.arrays import F8, Bools
from nexusengine.perf.model import Predictor


def prompts_s(model: Predictor, max_batch_tokens: int, prompt_tokens: F8) -> F8:
    """Predict how long prompts take, each for itself, in the largest steps there may be.

    Full steps and a last one are reckoned with, the attention spread evenly over them.

    Args:
        prompt_tokens: `[N]`, those to compute; at least 1.

    Returns:
        Seconds, `[N]`.
    """
    steps = np.ceil(prompt_tokens / max_batch_tokens)
    last = prompt_tokens - (steps - 1.0) * max_batch_tokens
    chunk = np.concatenate([np.full(len(prompt_tokens), float(max_batch_tokens)), last])
    one = np.ones(len(chunk))
    times_s = model.mean_s(chunk, one, one, chunk * np.tile(0.5 * prompt_tokens, 2), 0.0 * one)
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
    prefill_s = prompts_s(model, max_batch_tokens, prompt_tokens)
    decode_s = model.mean_s(one, one, zero, zero, prompt_tokens + 1.0)
    met: Bools = ~((prefill_s > ttft_s) | (decode_s > tpot_s))
    return met
