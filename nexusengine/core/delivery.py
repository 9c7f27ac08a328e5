"""From the tokens that a step sampled to what requests are sent.

Almost every token goes to a request that goes on, and is an id and a number on the wire: those take one short loop.
First and last tokens, and those with log-probabilities, are deltas of their own.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np

from nexusengine.arrays import I4, I8
from nexusengine.core.deltas import End, Outbox, first_delta, next_delta, token_logprobs
from nexusengine.core.first_token import FirstTokens
from nexusengine.core.in_flight import InFlightStep
from nexusengine.core.request import RequestState
from nexusengine.execute.batch import PENDING
from nexusengine.sampling.table import SampledLogprobs
from nexusengine.scheduler.scheduler import Scheduler
from nexusengine.types import Service


class Delivery:
    """Gives each request its next token, and ends those that are at their end.

    Args:
        scheduler: of the core.
        outbox: for the deltas.
        first_tokens: hears when they have come.
        service: what is told of how a request is served.
        finish: ends a request.

    Attributes:
        newest: `[S]`, the token that each slot sampled last, or PENDING.
        pending: `[S]`, how many tokens steps in flight sample, which their requests lack yet.
    """

    def __init__(
        self,
        scheduler: Scheduler[RequestState],
        outbox: Outbox,
        first_tokens: FirstTokens,
        service: Callable[[RequestState], Service],
        finish: Callable[[RequestState, End], None],
    ) -> None:
        self.newest: I4 = np.zeros(scheduler.slots, np.int32)
        self.pending: I4 = np.zeros(scheduler.slots, np.int32)
        self._scheduler, self._outbox, self._first_tokens = scheduler, outbox, first_tokens
        self._service, self._finish = service, finish

    def arrived(self, state: RequestState) -> None:
        """A request has got its slot."""
        self.newest[state.slot], self.pending[state.slot] = state.tokens[-1], 0

    def expect(self, slots: I4) -> None:
        """A step is under way that samples a token of each of `slots [N]`."""
        self.newest[slots] = PENDING
        self.pending[slots] += 1

    def deliver(
        self, step: InFlightStep, rows: I8, sampled: I8, tokens: I4, logprobs: SampledLogprobs | None, now: float
    ) -> None:
        """Give each request its token.

        Args:
            step: that sampled them.
            rows, sampled: `[N]`, of the requests that are still served: their numbers among the rows of the step, and
                among those that it sampled.
            tokens: `[N]`, theirs.
            logprobs: of all that were sampled.
            now: timestamp, seconds.
        """
        scheduler, slots = self._scheduler, step.batch.slots[rows]
        c, plain, pending = scheduler.columns, self._outbox.plain, self.pending[slots]
        delivered = c.generated_tokens[slots] - pending
        scheduler.judge(slots, delivered, np.array([now]))
        self.pending[slots] = pending - 1
        known = pending == 1
        self.newest[slots[known]] = tokens[known]
        c.last_token_s[slots[known]] = now
        goes_on = (delivered > 0) & (delivered + 1 < c.max_tokens[slots])
        if logprobs is not None:
            goes_on &= step.batch.sampling.logprobs[slots] < 0
        states = [step.states[row] for row in rows.tolist()]
        for state, token, simple, row in zip(states, tokens.tolist(), goes_on.tolist(), sampled.tolist(), strict=True):
            state.tokens.append(token)
            if simple and token not in state.end_ids:
                plain.append((state.request.request_id, (token,)))
            else:
                self._deliver(state, token, logprobs, row, now)
        scheduler.stats.generated_tokens += len(slots)

    def _deliver(self, state: RequestState, token: int, logprobs: SampledLogprobs | None, row: int, now: float) -> None:
        """A token that its request has just got, which may be its last. row: among those sampled."""
        if state.first_token_s is None:
            state.first_token_s = self._scheduler.columns.first_token_s[state.slot] = now
            self._first_tokens.came(state, now)
        if token in state.end_ids:
            stop_reason = token if token in state.request.sampling.stop_token_ids else None
            self._finish(state, End("stop", stop_reason=stop_reason))
            return
        found = None if logprobs is None else token_logprobs(logprobs, row, token, state)
        if state.output_tokens == state.max_tokens:
            self._finish(state, End("length", (token,), found))
            return
        is_first = state.output_tokens == 1
        delta = first_delta(state, self._service(state), token, found) if is_first else next_delta(state, token, found)
        self._outbox.full.append(delta)
