"""What can be said of a request the moment it arrives: when its first token is due to come, and whether its promise
can be kept at all. Both from the performance model's means."""

from __future__ import annotations

import numpy as np

from nexusengine.lens.view import I4, RequestColumns
from nexusengine.perf.features import StepFeatures
from nexusengine.perf.model import Predictor
from nexusengine.types import SLO


def first_token_in_s(
    model: Predictor,
    columns: RequestColumns,
    running: I4,
    waiting: I4,
    *,
    prompt_tokens: int,
    max_batch_tokens: int,
) -> float:
    """Seconds from now until a prompt that arrives now has its first token, if what is there goes first: the prompts
    that wait or have begun and are not relegated, in full steps beside one token of each decode. No policy is asked:
    one that lets a newcomer overtake others will beat this, one that makes it wait for the sake of decodes will not.

    running, waiting: slots as in EngineView. prompt_tokens: those to compute, without a cached prefix.
    """
    c = columns
    left = c.known_tokens[running] - c.computed_tokens[running]
    decodes, begun = running[left == 1], running[left > 1]
    ahead = np.concatenate([begun, waiting])
    ahead = ahead[~c.relegated[ahead]]
    computed = np.where(c.computed_tokens[ahead] > 0, c.computed_tokens[ahead], c.cached_tokens[ahead]).astype(float)
    q = c.known_tokens[ahead] - computed
    tokens = float(q.sum()) + prompt_tokens
    attention = float((q * (computed + 0.5 * q)).sum()) + 0.5 * float(prompt_tokens) ** 2
    kv_tokens = float(c.computed_tokens[decodes].sum()) + len(decodes)
    room = max(max_batch_tokens - len(decodes), 1)
    steps = -(-tokens // room)
    last = tokens - (steps - 1) * room
    chunk = np.array([float(room), last])  # of a full step and of the last one
    prompts_a_step = max((len(ahead) + 1) / steps, 1.0)
    times_s = model.mean_s(
        chunk + len(decodes),
        np.full(2, prompts_a_step + len(decodes)),
        np.full(2, prompts_a_step),
        chunk * (attention / tokens),
        np.full(2, kv_tokens),
    )
    return float((steps - 1) * times_s[0] + times_s[1])


def unattainable(model: Predictor, slo: SLO, *, prompt_tokens: int, max_batch_tokens: int) -> bool:
    """Whether the device would break the promise even if it served nothing else: the prompt alone takes longer than the
    TTFT (or the whole answer) may, or one decode step longer than a token may."""
    empty = RequestColumns.empty(0)
    nobody = np.zeros(0, np.int32)
    alone_s = first_token_in_s(
        model, empty, nobody, nobody, prompt_tokens=prompt_tokens, max_batch_tokens=max_batch_tokens
    )
    decode_s = model.predict(StepFeatures(1, 1, 0, 0.0, prompt_tokens + 1)).mean_s
    return alone_s > min(slo.ttft_s, slo.e2e_s or slo.ttft_s) or decode_s > slo.tpot_s
