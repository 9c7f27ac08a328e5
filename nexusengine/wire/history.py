"""The records of steps and requests that a worker keeps: written by its core, sent to those who ask (`/debug`)."""

from __future__ import annotations

import msgspec

from nexusengine.types import SLO, FinishReason, Service, Timings
from nexusengine.wire.base import Count, Message


class StepRecord(msgspec.Struct, frozen=True, array_like=True):
    """One step as it was planned and as it went.

    Attributes:
        step: its number, from 1.
        started_s: timestamp on the core's clock.
        tokens, sequences, prefills, prefill_attention, decode_kv_tokens: its size; see perf.features.StepFeatures.
        predicted_s, upper_s: its duration as predicted, and the bound held in 95 % of steps.
        device_s, scheduler_s: seconds that it took, and that planning it and applying its result took.
        running, waiting: requests after it.
        preempted: requests that lost their KV blocks to it.
        reasons: requests by scheduler.plan.Reason, in lower case; only those that occur.
        notes: the policy's own.
    """

    step: int
    started_s: float
    tokens: int
    sequences: int
    prefills: int
    prefill_attention: float
    decode_kv_tokens: int
    predicted_s: float
    upper_s: float
    device_s: float
    scheduler_s: float
    running: int
    waiting: int
    preempted: int
    reasons: dict[str, int]
    notes: dict[str, float]


class RequestChange(msgspec.Struct, frozen=True, array_like=True):
    """From this step on: why a request did what it did.

    Attributes:
        at_s: timestamp of the step.
        reason: a scheduler.plan.Reason, in lower case.
        tokens: that it computed in the step.
    """

    at_s: float
    step: int
    reason: str
    tokens: int


class RequestRecord(msgspec.Struct, frozen=True, array_like=True):
    """A request that a core works on, or did not long ago; without its tokens.

    Attributes:
        slo_class: None without an SLO.
        timings: timestamps on the core's clock.
        finish_reason: None until it has ended.
        error: why it failed, if it did.
    """

    request_id: str
    prompt_tokens: int
    slo: SLO | None
    slo_class: str | None
    priority: int
    timings: Timings
    service: Service
    cached_tokens: int = 0
    preemptions: int = 0
    finish_reason: FinishReason | None = None
    error: str | None = None


class RequestHistory(msgspec.Struct, frozen=True, array_like=True):
    """All that a worker remembers of a request.

    Attributes:
        now_s: timestamp of this reply.
        changes: at most MAX_CHANGES_IN_REPLY, oldest first.
        changes_left_off: older ones that are remembered.
        steps: those of the changes that are remembered, at most MAX_STEPS_IN_REPLY, the newest.
    """

    record: RequestRecord
    now_s: float
    changes: tuple[RequestChange, ...]
    changes_left_off: int
    steps: tuple[StepRecord, ...]


class DebugQuery(Message, frozen=True):
    """A client asks every worker for its newest steps, or for what it remembers of a request.

    Each answers with a `DebugReply`.

    Attributes:
        query: the client's number for it.
        client: ZeroMQ identity, filled in by the router.
    """

    query: Count
    last_steps: Count = 0
    request_id: str | None = None
    client: bytes = b""


class DebugReply(Message, frozen=True):
    """The answer to a `DebugQuery`, passed on to the client by the router.

    Attributes:
        request: None if the worker knows no such request, or none was asked for.
    """

    client: bytes
    query: int
    worker_id: str
    steps: tuple[StepRecord, ...] = ()
    request: RequestHistory | None = None
