"""What can be said of a request the moment it arrives: whether it can be served, and whether its SLO can be met."""

from __future__ import annotations

import numpy as np

from nexusengine.core.request import RequestState
from nexusengine.errors import InvalidRequest
from nexusengine.forecast.trust import is_trustworthy
from nexusengine.perf.features import StepFeatures
from nexusengine.perf.model import PerformanceModel
from nexusengine.request_limits import check_fits, check_token_ids
from nexusengine.scheduler.attainable import prompts_s
from nexusengine.scheduler.scheduler import Scheduler
from nexusengine.types import SLO, EngineRequest


def longest_output(request: EngineRequest, vocab_size: int, max_model_len: int) -> int:
    """The number of output tokens at which the request ends. Raises InvalidRequest or ContextTooLong."""
    ids, wanted = request.prompt_token_ids, request.sampling.max_tokens
    if not ids:
        raise InvalidRequest("the prompt is empty", param="prompt")
    check_token_ids(ids, vocab_size, "prompt")
    if request.sampling.seed is None:
        raise InvalidRequest("a seed must be drawn before a request reaches the engine core", param="seed")
    if not -(2**31) <= request.priority < 2**31:
        raise InvalidRequest(f"priority {request.priority} is not a 32-bit number", param="priority")
    check_fits(len(ids), wanted, max_model_len)
    return wanted or max_model_len - len(ids)


def is_unattainable(scheduler: Scheduler[RequestState], state: RequestState) -> bool:
    """Whether a request that has just arrived has an SLO that is out of reach; see `unattainable`."""
    slo, kv = state.request.slo, scheduler.kv
    if slo is None:
        return False
    cached = kv.lookup(state.block_hashes, state.prompt_tokens - 1).tokens if kv.prefix_caching else 0
    return unattainable(scheduler.model, scheduler.max_batch_tokens, state.prompt_tokens - cached, slo)


def unattainable(model: PerformanceModel, max_batch_tokens: int, prompt_tokens: int, slo: SLO) -> bool:
    """Whether the device would surely miss the SLO even if it served nothing else.

    It would if the prompt took longer than TTFT, or a decode after it longer than TPOT, even at the lower bound of
    their time: as far below the mean as the upper bound is above it. Nothing is sure of a kind of step of which the
    model is not trustworthy. The whole response may not take longer than its bound either.

    Args:
        prompt_tokens: those to compute, without a cached prefix; at least 1.
    """
    chunk = min(prompt_tokens, max_batch_tokens)
    prompt = StepFeatures(chunk, 1, int(chunk > 1), 0.5 * chunk * chunk, int(chunk == 1))
    decode = StepFeatures(1, 1, 0, 0.0, prompt_tokens + 1)
    prompt_s = float(prompts_s(model, max_batch_tokens, np.array([float(prompt_tokens)]))[0])
    ttft_s = min(slo.ttft_s, slo.e2e_s or slo.ttft_s)
    return _surely_exceeds(model, prompt, prompt_s, ttft_s) or _surely_exceeds(
        model, decode, model.predict(decode).mean_s, slo.tpot_s
    )


def _surely_exceeds(model: PerformanceModel, step: StepFeatures, mean_s: float, bound_s: float) -> bool:
    """Whether steps like this one that take mean_s in the mean exceed a bound even at the lower bound of their time."""
    time = model.predict(step)
    return mean_s * time.mean_s / time.upper_s > bound_s and is_trustworthy(model, [step])
