"""How long prompts take at the best, and whether an SLO can be met at all: for the core and for LENS alike."""

from __future__ import annotations

import numpy as np

from nexusengine.arrays import F8, Bools
from nexusengine.perf.features import StepFeatures
from nexusengine.perf.model import Predictor

_FEW = 4  # predictions, up to which one after the other is faster than all at once


def prompts_s(model: Predictor, max_batch_tokens: int, prompt_tokens: F8) -> F8:
    """Predict how long prompts take, each for itself, in the largest steps there may be.

    Full steps and a last one are reckoned with, the attention spread evenly over them.

    Args:
        prompt_tokens: `[N]`, those to compute; at least 1.

    Returns:
        Seconds, `[N]`.
    """
    if len(prompt_tokens) <= _FEW and prompt_tokens.max(initial=0.0) <= max_batch_tokens:  # as is usual
        chunks = [
            StepFeatures(tokens, 1, 1, 0.5 * tokens * tokens) for tokens in prompt_tokens.astype(np.int64).tolist()
        ]
        return np.array([model.predict(chunk).mean_s for chunk in chunks])
    steps = np.ceil(prompt_tokens / max_batch_tokens)
    last = prompt_tokens - (steps - 1.0) * max_batch_tokens
    one = np.ones(len(last))
    if not np.count_nonzero(steps > 1.0):
        return model.mean_s(last, one, one, last * 0.5 * prompt_tokens, 0.0 * one)
    chunk = np.concatenate([np.full(len(last), float(max_batch_tokens)), last])
    ones = np.tile(one, 2)
    times_s = model.mean_s(chunk, ones, ones, chunk * np.tile(0.5 * prompt_tokens, 2), 0.0 * ones)
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
    prefill_s = prompts_s(model, max_batch_tokens, prompt_tokens)
    if len(prompt_tokens) <= _FEW:
        decodes = [StepFeatures(1, 1, 0, 0.0, tokens + 1) for tokens in prompt_tokens.astype(np.int64).tolist()]
        decode_s = np.array([model.predict(decode).mean_s for decode in decodes])
    else:
        one, zero = np.ones(len(prompt_tokens)), np.zeros(len(prompt_tokens))
        decode_s = model.mean_s(one, one, zero, zero, prompt_tokens + 1.0)
    met: Bools = ~((prefill_s > ttft_s) | (decode_s > tpot_s))
    return met
