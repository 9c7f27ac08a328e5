"""From the tokens that a step sampled to what requests are sent.

Almost every token goes to a request that goes on, and is an id and a number on the wire: those take one short loop.
First and last tokens, and those with log-probabilities, are deltas of their own.
"""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np

from nexusengine.arrays import I4, I8
from nexusengine.core.deltas import End, Logprobs, Outbox
from nexusengine.core.in_flight import InFlightStep
from nexusengine.core.request import RequestState
from nexusengine.execute.batch import PENDING
from nexusengine.scheduler.scheduler import Scheduler


class Delivery:
    """Gives each request its next token.

    Args:
        scheduler: of the core.
        outbox: for the tokens of requests that go on.

    Attributes:
        newest: `[S]`, the token that each slot sampled last, or PENDING.
        pending: `[S]`, how many tokens steps in flight sample, which their requests lack yet.
    """

    def __init__(self, scheduler: Scheduler[RequestState], outbox: Outbox) -> None:
        self.newest: I4 = np.zeros(scheduler.slots, np.int32)
        self.pending: I4 = np.zeros(scheduler.slots, np.int32)
        self._scheduler, self._outbox = scheduler, outbox

    def arrived(self, state: RequestState) -> None:
        """A request has got its slot."""
        self.newest[state.slot], self.pending[state.slot] = state.tokens[-1], 0

    def expect(self, slots: I4) -> None:
        """A step is under way that samples a token of each of `slots [N]`."""
        self.newest[slots] = PENDING
        self.pending[slots] += 1

    def deliver(
        self, step: InFlightStep, rows: I8, sampled: I8, tokens: I4, now: float, *, logprobs: bool
    ) -> Iterator[tuple[RequestState, int, int]]:
        """Give each request its token.

        Args:
            step: that sampled them.
            rows, sampled: `[N]`, of the requests that are still served: their numbers among the rows of the step, and
                among those that it sampled.
            tokens: `[N]`, theirs.
            now: timestamp, seconds.
            logprobs: some asked for log-probabilities.

        Yields:
            Each request of which more is to be said, by its first token, its last or log-probabilities: it, its token,
            which it has already, and its number among those sampled.
        """
        scheduler, slots = self._scheduler, step.batch.slots[rows]
        c, plain, pending = scheduler.columns, self._outbox.plain, self.pending[slots]
        delivered = c.generated_tokens[slots] - pending
        scheduler.judge(slots, delivered, np.array([now]))
        scheduler.stats.generated_tokens += len(slots)
        self.pending[slots] = pending - 1
        known = pending == 1
        self.newest[slots[known]] = tokens[known]
        c.last_token_s[slots[known]] = now
        goes_on = (delivered > 0) & (delivered + 1 < c.max_tokens[slots])
        if logprobs:
            goes_on &= step.batch.sampling.logprobs[slots] < 0
        states = [step.states[row] for row in rows.tolist()]
        for state, token, simple, row in zip(states, tokens.tolist(), goes_on.tolist(), sampled.tolist(), strict=True):
            state.tokens.append(token)
            if simple and token not in state.end_ids:
                plain.append((state.request.request_id, (token,)))
            else:
                yield state, token, row


def end_by(state: RequestState, token: int, logprobs: Logprobs) -> End | None:
    """How a request ends by the token that it has just got; None if it goes on."""
    if token in state.end_ids:
        return End("stop", stop_reason=token if token in state.request.sampling.stop_token_ids else None)
    return End("length", (token,), logprobs) if state.output_tokens == state.max_tokens else None
