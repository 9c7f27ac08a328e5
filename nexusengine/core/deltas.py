"""The deltas of a request, token by token."""

from __future__ import annotations

from typing import NamedTuple

from nexusengine.core.request import RequestState
from nexusengine.sampling.table import SampledLogprobs
from nexusengine.types import FinishReason, Service, TokenDelta, TokenLogprob
from nexusengine.wire import PlainDelta, Split

Logprobs = tuple[TokenLogprob, ...] | None


class Error(NamedTuple):
    """Why a request failed. code: of a NexusError."""

    code: str
    message: str
    retry_after_s: float | None = None


class End(NamedTuple):
    """How a request ended. token_ids: its last token, where that is output. stop_reason: the token that stopped it."""

    reason: FinishReason
    token_ids: tuple[int, ...] = ()
    logprobs: Logprobs = None
    stop_reason: int | None = None
    error: Error | None = None

    @property
    def complete(self) -> bool:
        """Whether the answer ended by itself or at its longest."""
        return self.reason in ("stop", "length")


class Outbox:
    """Deltas that wait to be sent.

    Attributes:
        plain: (request id, token ids) of requests that go on, which is what most are.
        full: all others, which follow.
    """

    def __init__(self) -> None:
        self.plain: list[PlainDelta] = []
        self.full: list[TokenDelta] = []

    def take(self) -> Split:
        """All of them, which leave it."""
        split = tuple(self.plain), tuple(self.full)
        self.plain.clear()
        self.full.clear()
        return split


def first_delta(state: RequestState, service: Service, token: int, logprobs: Logprobs) -> TokenDelta:
    return TokenDelta(
        state.request.request_id,
        (token,),
        logprobs,
        timings=state.timings(None),
        cached_tokens=state.cached_tokens,
        service=service,
    )


def next_delta(state: RequestState, token: int, logprobs: Logprobs) -> TokenDelta:
    return TokenDelta(state.request.request_id, (token,), logprobs)


def last_delta(state: RequestState, service: Service, now: float, end: End) -> TokenDelta:
    error = end.error
    return TokenDelta(
        state.request.request_id,
        end.token_ids,
        end.logprobs,
        finish_reason=end.reason,
        stop_reason=end.stop_reason,
        timings=state.timings(now),
        cached_tokens=state.cached_tokens,
        preemptions=state.preemptions,
        error_code=error.code if error else None,
        error_message=error.message if error else None,
        retry_after_s=error.retry_after_s if error else None,
        service=service,
    )


def token_logprobs(sampled: SampledLogprobs, row: int, token: int, state: RequestState) -> Logprobs:
    """Of the token that a row sampled, if its request asked for them."""
    wanted = state.request.sampling.logprobs
    if wanted is None:
        return None
    ids, values = sampled.top_ids[row, :wanted].tolist(), sampled.top[row, :wanted].tolist()
    return (TokenLogprob(token, float(sampled.chosen[row]), tuple(zip(ids, values, strict=True))),)
