"""What can be said of a request when it arrives.

Whether it can be served, when its first token is due to come, and whether its SLO can be met at all.
"""

from __future__ import annotations

import math

import numpy as np

from nexusengine.arrays import F8, I4
from nexusengine.core.request import RequestState
from nexusengine.errors import InvalidRequest
from nexusengine.forecast.backlog import Prompts, first_tokens_in_s
from nexusengine.forecast.speed import Speed, predict_speed
from nexusengine.forecast.trust import is_trustworthy
from nexusengine.perf.features import StepFeatures
from nexusengine.request_limits import check_fits, check_token_ids
from nexusengine.scheduler.attainable import attainable
from nexusengine.scheduler.scheduler import Scheduled, Scheduler
from nexusengine.scheduler.view import EngineView, RequestColumns
from nexusengine.slo.due import first_tokens_due_s
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
    """Requests that no plan has seen yet."""

    def __init__(self) -> None:
        self._states: list[RequestState] = []

    def add(self, state: RequestState, view: EngineView, cached_tokens: int) -> None:
        """Judge whether a request's SLO can be met, before it is one of those that wait.

        Args:
            view: the engine without it.
            cached_tokens: of its prompt, in the prefix cache.
        """
        request, prompt_tokens = state.request, state.known - cached_tokens
        state.unattainable = request.slo is not None and unattainable(view, prompt_tokens, request.slo)
        self._states.append(state)

    def planned(
        self, scheduler: Scheduler[RequestState], scheduled: Scheduled[RequestState], rest_s: float, now: float
    ) -> None:
        """Predict when their first tokens come, now that the first step is planned that could serve them.

        Args:
            rest_s: seconds until that step begins, because another one is under way.
            now: timestamp, seconds.
        """
        states = [s for s in self._states if scheduler.requests.get(s.slot) is s]
        self._states.clear()
        if not states:
            return
        slots = np.array([s.slot for s in states], np.int32)
        for state, in_s in zip(states, predict(scheduler, scheduled, slots, rest_s, now), strict=True):
            if in_s is not None:
                state.predicted_ttft_s = max(now - state.request.arrival_s, 0.0) + in_s


def predict(
    scheduler: Scheduler[RequestState], scheduled: Scheduled[RequestState], asked: I4, rest_s: float, now: float
) -> list[float | None]:
    """Seconds until requests have their first token, by the roll-forward with which PRISM places.

    Args:
        scheduled: the next step; nothing of it is in the columns yet.
        asked: `[N]`, slots that wait or are partially prefilled.
        rest_s: seconds until that step begins.
        now: timestamp, seconds.

    Returns:
        `[N]`; None where the performance model is not trustworthy yet.
    """
    view, c, model = scheduler.view(), scheduler.columns, scheduler.model
    counts = np.zeros(scheduler.slots, np.int32)
    counts[scheduled.slots] = scheduled.counts
    slots = np.concatenate([view.running, view.waiting])
    done = c.context_tokens(slots) + counts[slots]
    left = c.known_tokens[slots] - done
    decodes, pending = slots[left == 0], slots[left > 0]
    left, done = left[left > 0].astype(np.float64), done[left > 0].astype(np.float64)
    steps: list[StepFeatures] = []
    if len(scheduled.slots):
        rest_s += scheduled.plan.predicted_s
        steps.append(StepFeatures.of(scheduled.counts, c.computed_tokens[scheduled.slots]))
    in_s = np.full(scheduler.slots, rest_s)
    trusted_at_once = trusted_later = is_trustworthy(model, steps)
    if len(pending):
        speed = _speed(scheduler, decodes, pending)
        prompts = Prompts(_due_s(scheduled, c, pending), left, done)
        in_s[pending] = first_tokens_in_s(prompts, c.relegated[pending], speed, scheduler.policy.traits, rest_s, now)
        largest = int(min(speed.chunk_tokens, left.sum()))
        later = StepFeatures(largest + len(decodes), 1 + len(decodes), 1)
        trusted_later = trusted_at_once and is_trustworthy(model, [later])
    is_later = np.zeros(scheduler.slots, np.bool_)
    is_later[pending] = True
    return [
        seconds if (trusted_later if late else trusted_at_once) else None
        for seconds, late in zip(in_s[asked].tolist(), is_later[asked].tolist(), strict=True)
    ]


def _speed(scheduler: Scheduler[RequestState], decodes: I4, pending: I4) -> Speed:
    """The engine's speed beside these decodes."""
    c = scheduler.columns
    tpot_s = c.tpot_s[np.concatenate([decodes, pending])]
    return predict_speed(
        scheduler.model,
        scheduler.model.snapshot().quantile,
        len(decodes),
        float(c.known_tokens[decodes].sum()),
        float(np.fmin.reduce(tpot_s, initial=math.inf)),
        scheduler.max_batch_tokens,
        scheduler.policy.traits,
    )


def _due_s(scheduled: Scheduled[RequestState], c: RequestColumns, slots: I4) -> F8:
    """Timestamps by which the policy wants prompts to be done: their SLO's, if it does not say."""
    due_s = scheduled.plan.due_s
    return first_tokens_due_s(c.arrival_s[slots], c.ttft_s[slots]) if due_s is None else due_s[slots]
