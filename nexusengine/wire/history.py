"""What a worker remembers of its steps and of a request, for those who ask afterwards (`/debug`, `explain`)."""

from __future__ import annotations

import msgspec

from nexusengine.wire.base import Count, Message


class StepHistory(msgspec.Struct, frozen=True, array_like=True):
    """A step as it was planned and as it went; see scheduler.stats.StepRecord. reasons: requests by their Reason."""

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
    """From this step on: why a request did what it did (a scheduler.plan.Reason), and the tokens it computed in it."""

    at_s: float
    step: int
    reason: str
    tokens: int


class RequestHistory(msgspec.Struct, frozen=True, array_like=True):
    """All that a worker remembers of a request. Instants are monotonic, now_s that of the answer; None where it did not
    get there. finish_reason: None while it lives. changes_left_off: older ones than those here that are remembered.
    steps: those of the changes that are remembered, at most MAX_STEPS_IN_ANSWER, the newest."""

    request_id: str
    worker_id: str
    slo_class: str
    ttft_s: float | None
    tpot_s: float | None
    e2e_s: float | None
    priority: int
    prompt_tokens: int
    cached_tokens: int
    output_tokens: int
    preemptions: int
    predicted_ttft_s: float
    unattainable: bool
    strict: bool
    arrival_s: float
    scheduled_s: float | None
    first_token_s: float | None
    finished_s: float | None
    now_s: float
    finish_reason: str | None
    error: str | None
    changes: tuple[RequestChange, ...]
    changes_left_off: int
    steps: tuple[StepHistory, ...]


class Ask(Message, frozen=True):
    """A client asks every worker for its newest steps, or for what it remembers of a request; each answers with
    `Findings`. query: the client's number for it. client: filled in by the router."""

    query: Count
    last_steps: Count = 0
    request_id: str | None = None
    client: bytes = b""


class Findings(Message, frozen=True):
    """What a worker knows of what was asked; passed on to the client by the router. request: None if it knows no such
    request, or none was asked for."""

    client: bytes
    query: int
    worker_id: str
    steps: tuple[StepHistory, ...] = ()
    request: RequestHistory | None = None
