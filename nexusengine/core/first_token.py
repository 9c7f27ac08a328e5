"""When the first tokens of new requests come, as it is told to users.

A request is predicted when the first step after its arrival is planned: then all that arrived with it are known, and
what the policy does with it. That is at once, or at the end of the step under way.
"""

from __future__ import annotations

import math
from collections.abc import Iterable

import numpy as np

from nexusengine.arrays import F8, I4
from nexusengine.core.in_flight import InFlightStep
from nexusengine.core.request import RequestState
from nexusengine.forecast.backlog import Prompts, first_tokens_in_s
from nexusengine.forecast.speed import Speed, predict_speed
from nexusengine.forecast.trust import TTFTErrors, is_trustworthy
from nexusengine.perf.features import StepFeatures
from nexusengine.scheduler.plan import Reason
from nexusengine.scheduler.scheduler import Scheduled, Scheduler
from nexusengine.scheduler.view import RequestColumns
from nexusengine.slo.due import first_tokens_due_s

_POSSIBLE_STEPS = 1.02  # a TPOT below so many decode steps of a single sequence constrains nobody
_CONTEXT_TOKENS = 1024


class FirstTokens:
    """Predicts each request once, and learns how well that went."""

    def __init__(self) -> None:
        self._new: list[RequestState] = []
        self._errors = TTFTErrors()

    def arrived(self, state: RequestState) -> None:
        """A request waits that no plan has seen yet."""
        self._new.append(state)

    def planned(
        self,
        scheduler: Scheduler[RequestState],
        scheduled: Scheduled[RequestState],
        in_flight: Iterable[InFlightStep],
        now: float,
    ) -> None:
        """Predict those who are new, by the first plan that has seen them.

        Args:
            scheduled: the next step; nothing of it is in the columns yet.
            in_flight: steps that are under way and end before.
            now: timestamp, seconds.
        """
        states = [s for s in self._new if scheduler.requests.get(s.slot) is s]
        self._new.clear()
        if not states:
            return
        slots = np.array([s.slot for s in states], np.int32)
        rest_s = max((s.expected_end_s - now for s in in_flight), default=0.0)
        for state, in_s in zip(states, predict(scheduler, scheduled, slots, max(rest_s, 0.0), now), strict=True):
            if in_s is not None:
                state.foreseen_ttft_s = max(now - state.request.arrival_s, 0.0) + in_s
                state.predicted_ttft_s = state.foreseen_ttft_s if self._errors.small else None

    def came(self, state: RequestState, now: float) -> None:
        """The request has its first token."""
        if state.foreseen_ttft_s is not None:
            self._errors.learn(state.foreseen_ttft_s, now - state.request.arrival_s)


def predict(
    scheduler: Scheduler[RequestState], scheduled: Scheduled[RequestState], asked: I4, rest_s: float, now: float
) -> list[float | None]:
    """Seconds until requests have their first token, by the roll-forward with which PRISM places.

    Args:
        scheduled: the next step; nothing of it is in the columns yet.
        asked: `[N]`, slots that wait for their first token.
        rest_s: seconds until that step begins.
        now: timestamp, seconds.

    Returns:
        `[N]`; None where the performance model is not trustworthy yet, and of those whom the policy has relegated or
        deferred: when they are served is up to those who are yet to come.
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
    later, unknown = np.zeros(scheduler.slots, np.bool_), np.zeros(scheduler.slots, np.bool_)
    trust_now = trust_later = is_trustworthy(model, steps)
    if len(pending):
        speed, later[pending] = _speed(scheduler, decodes, pending), True
        prompts = Prompts(_due_s(scheduled, c, pending), left, done)
        last = c.relegated[pending] | (scheduled.plan.reasons[pending] == Reason.DEFERRED)
        in_s[pending] = first_tokens_in_s(prompts, last, speed, scheduler.policy.traits, rest_s, now)
        unknown[pending[last]] = True
        largest = int(min(speed.chunk_tokens, left.sum()))
        trust_later &= is_trustworthy(model, [StepFeatures(largest + len(decodes), 1 + len(decodes), 1)])
    told = np.where(later, trust_later, trust_now)
    rows = zip(in_s[asked].tolist(), (told & ~unknown)[asked].tolist(), strict=True)
    return [seconds if is_told else None for seconds, is_told in rows]


def _speed(scheduler: Scheduler[RequestState], decodes: I4, pending: I4) -> Speed:
    """The engine's speed beside these decodes."""
    c, model = scheduler.columns, scheduler.model
    tpot_s = c.tpot_s[np.concatenate([decodes, pending])]
    single_s = model.predict(StepFeatures(1, 1, 0, 0.0, _CONTEXT_TOKENS)).mean_s
    return predict_speed(
        model,
        model.snapshot().quantile,
        len(decodes),
        float(c.known_tokens[decodes].sum()),
        float(tpot_s[tpot_s > _POSSIBLE_STEPS * single_s].min(initial=math.inf)),
        scheduler.max_batch_tokens,
        scheduler.policy.traits,
    )


def _due_s(scheduled: Scheduled[RequestState], c: RequestColumns, slots: I4) -> F8:
    """Timestamps by which the policy wants prompts to be done: their SLOs', if it does not say."""
    due_s = scheduled.plan.due_s
    return first_tokens_due_s(c.arrival_s[slots], c.ttft_s[slots]) if due_s is None else due_s[slots]
