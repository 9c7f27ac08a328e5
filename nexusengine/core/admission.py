"""What can be said of a request the moment it arrives.

Whether it can be served, when its first token is due to come, and whether its SLO can be met at all; the last two from
the performance model's means.
"""

from __future__ import annotations

import math
from collections.abc import Mapping

import numpy as np

from nexusengine.core.request import RequestState
from nexusengine.errors import InvalidRequest
from nexusengine.request_limits import check_fits, check_token_ids
from nexusengine.scheduler.attainable import attainable, prompts_s
from nexusengine.scheduler.plan import StepPlan
from nexusengine.scheduler.view import EngineView
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


def first_token_in_s(view: EngineView, prompt_tokens: int) -> float:
    """Seconds from now until a prompt that arrives now has its first token, if what is there goes first.

    That is the prompts that wait or are partially prefilled and are not relegated, in full steps beside one token of
    each decode. No policy is asked: one that lets a new request overtake others will beat this, one that makes it wait
    for the sake of decodes will not.

    Args:
        view: the engine without it.
        prompt_tokens: those to compute, without a cached prefix.
    """
    c, running = view.columns, view.running
    left = c.known_tokens[running] - c.computed_tokens[running]
    decodes = running[left == 1]
    ahead = np.concatenate([running[left > 1], view.waiting])
    ahead = ahead[~c.relegated[ahead]]
    computed = c.context_tokens(ahead)
    q = (c.known_tokens[ahead] - computed).astype(np.float64)
    took_s = prompts_s(
        view.model,
        view.max_batch_tokens,
        np.array([float(q.sum()) + prompt_tokens]),
        np.array([float((q * (computed + 0.5 * q)).sum()) + 0.5 * float(prompt_tokens) ** 2]),
        np.array([len(ahead) + 1.0]),
        decodes=len(decodes),
        kv_tokens=float(c.computed_tokens[decodes].sum()) + len(decodes),
    )
    return float(took_s[0])


def unattainable(view: EngineView, prompt_tokens: int, slo: SLO) -> bool:
    """Whether the device would miss the SLO even if it served nothing else (see scheduler.attainable).

    The whole response may not take longer than its bound either.
    """
    ttft_s = min(slo.ttft_s, slo.e2e_s or slo.ttft_s)
    met = attainable(
        view.model, view.max_batch_tokens, np.array([float(prompt_tokens)]), np.array([ttft_s]), np.array([slo.tpot_s])
    )
    return not met[0]


class NewArrivals:
    """Requests that no plan has seen yet, and when their first token is expected."""

    def __init__(self) -> None:
        self._states: list[RequestState] = []

    def add(self, state: RequestState, view: EngineView, cached_tokens: int, now: float) -> None:
        """Predict a request's TTFT, and whether its SLO can be met, before it is one of those that wait.

        Args:
            view: the engine without it.
            cached_tokens: of its prompt, in the prefix cache.
            now: timestamp, seconds.
        """
        request, prompt_tokens = state.request, state.known - cached_tokens
        waited_s = max(now - request.arrival_s, 0.0)
        state.predicted_ttft_s = waited_s + first_token_in_s(view, prompt_tokens)
        state.unattainable = request.slo is not None and unattainable(view, prompt_tokens, request.slo)
        self._states.append(state)

    def planned(self, plan: StepPlan, requests: Mapping[int, RequestState]) -> None:
        """The policy knows better when first tokens come, where it expects to meet the SLO. requests: by slot."""
        for state in self._states if plan.first_token_s is not None else ():
            at_s = float(plan.first_token_s[state.slot])  # type: ignore[index]
            if math.isfinite(at_s) and requests.get(state.slot) is state:
                state.predicted_ttft_s = max(at_s - state.request.arrival_s, 0.0)
        self._states.clear()
