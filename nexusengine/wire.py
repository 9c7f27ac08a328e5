"""Every message between processes: msgspec tagged structs over ZeroMQ, msgpack-encoded.

A message is one frame. Frozen dataclasses of `types` travel inside as they are. A frame that is no message of this
protocol, or whose numbers are out of range, raises `ProtocolError` where it is decoded; who sent it is ignored. A peer
that says it speaks another version of the protocol is answered with `Refused`.
"""

from __future__ import annotations

from collections.abc import Iterable
from enum import StrEnum
from typing import Annotated, Literal

import msgspec
from msgspec import Meta

from nexusengine.errors import NexusError
from nexusengine.types import EngineRequest, TokenDelta

PROTOCOL_VERSION = 2
MAX_MESSAGE_BYTES = 64 * 2**20
MAX_PENDING_IN_REPORT = 64
MAX_DIGEST_BYTES = 32 * 2**10
MAX_STEPS_IN_ANSWER = 512
MAX_CHANGES_IN_ANSWER = 1024

Count = Annotated[int, Meta(ge=0, le=2**53)]
Seconds = Annotated[float, Meta(ge=0.0, le=1e9)]
"""A duration; neither NaN nor infinite."""


class ProtocolError(NexusError):
    """A message that is not of this protocol."""

    code = "protocol_error"


class WorkerState(StrEnum):
    """starting: loading its model. ready: takes requests. stalled: a step takes far longer than predicted.
    draining: finishes what it has. gone: process ended or silent for too long."""

    STARTING = "starting"
    READY = "ready"
    STALLED = "stalled"
    DRAINING = "draining"
    GONE = "gone"


class Message(msgspec.Struct, frozen=True, tag=True, array_like=True):
    """Base of all messages; the class name is the tag."""


# ---- parts of messages ------------------------------------------------------------------------------------------


class PendingPrefill(msgspec.Struct, frozen=True, array_like=True):
    """A prompt that is not fully computed: its TTFT deadline (monotonic; infinite without an SLO), tokens left and
    done."""

    deadline_s: float
    left_tokens: Count
    done_tokens: Count
    tpot_s: float
    relegated: bool


class PerfWeights(msgspec.Struct, frozen=True, array_like=True):
    """`perf.model.PerfSnapshot` on the wire."""

    kind: str
    weights: Annotated[tuple[float, ...], Meta(max_length=1024)]
    quantile: Annotated[float, Meta(gt=0.0, le=1e6)]
    steps: Count
    epoch: Count


class WorkerLoad(msgspec.Struct, frozen=True, array_like=True):
    """What a worker is doing at one instant.

    last_dispatch_seq: the last dispatch (by `Dispatch.seq`) whose effect is included here.
    step: number of the newest step; step_running_s: how long it has been running, 0 between steps; step_upper_s: the
    bound predicted for it.
    tightest_tpot_s: of the decodes; NaN without one. pending: at most MAX_PENDING_IN_REPORT, earliest deadline first,
    relegated ones after all others. relegated, relegated_tokens: how many are relegated, and their tokens left.
    totals: counters since the worker started, by metric name (see server.metrics).
    """

    last_dispatch_seq: Count
    running: Count = 0
    waiting: Count = 0
    kv_used_blocks: Count = 0
    kv_total_blocks: Count = 0
    step: Count = 0
    step_running_s: Seconds = 0.0
    step_upper_s: Seconds = 0.0
    decodes: Count = 0
    decode_kv_tokens: Count = 0
    tightest_tpot_s: float = float("nan")
    pending: Annotated[tuple[PendingPrefill, ...], Meta(max_length=MAX_PENDING_IN_REPORT)] = ()
    pending_tokens: Count = 0
    mean_output_tokens: Annotated[float, Meta(ge=0.0, le=1e12)] = 0.0
    perf: PerfWeights | None = None
    totals: Annotated[dict[str, float], Meta(max_length=1024)] = {}
    relegated: Count = 0
    relegated_tokens: Count = 0


class PolicyTraits(msgspec.Struct, frozen=True, array_like=True):
    """What others need to know of an engine policy to foresee what it does; each policy declares its own.

    order: which prompts it serves first, by the "deadline" of their first token, as of their "arrival", or those with
    the "shortest" rest. relegates: whether prompts that cannot be in time go behind all others.
    step_tokens: most tokens of a step, 0 for the engine's own limit. step_s, single_steps: no step is planned longer
    than step_s seconds, or than so many steps of a single token if that is longer; infinite if only tokens count.
    by_tpot: whether steps are kept within the tightest TPOT of those that decode.
    """

    order: Literal["deadline", "arrival", "shortest"] = "deadline"
    relegates: bool = True
    step_tokens: Count = 0
    step_s: float = 0.12
    single_steps: float = 2.5
    by_tpot: bool = True


class WorkerInfo(msgspec.Struct, frozen=True, array_like=True):
    """What a worker is. worker_id: stable over restarts ("w0"); epoch: unique for each process. scheduler, traits: name
    of its engine policy, for people, and what it declares. max_waiting: requests that may wait in it; more are
    refused. 0 and "" where not known yet."""

    worker_id: str
    epoch: str
    pid: int
    device: str
    model: str
    dtype: str = ""
    attention_backend: str = ""
    max_model_len: int = 0
    max_batch_tokens: int = 0
    block_size: int = 0
    kv_total_blocks: int = 0
    weights_bytes: int = 0
    kv_bytes: int = 0
    scheduler: str = ""
    max_waiting: int = 0
    traits: PolicyTraits = PolicyTraits()


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


# ---- worker -> router -------------------------------------------------------------------------------------------


class Starting(Message, frozen=True):
    """A worker that is not ready yet: phase ("loading weights") and fraction done 0..1. Also a heartbeat."""

    info: WorkerInfo
    phase: Annotated[str, Meta(max_length=1024)]
    fraction: Annotated[float, Meta(ge=0.0, le=1.0)]
    protocol: int = PROTOCOL_VERSION


class Ready(Message, frozen=True):
    """A worker that takes requests from now on.

    Attributes:
        in_flight: requests that it still works on.
        last_dispatch_seq: the last dispatch that it has seen, from before the router was restarted or thought it gone;
            new ones are numbered from there.
    """

    info: WorkerInfo
    in_flight: tuple[str, ...] = ()
    protocol: int = PROTOCOL_VERSION
    last_dispatch_seq: Count = 0


class PrefixDigest(msgspec.Struct, frozen=True, array_like=True):
    """What has changed in a worker's prefix cache: the newest batches of `kv.digest.DigestSender`, of which the last
    has the number seq. A batch is names that came and names that went, 8 bytes each; all together at most
    MAX_DIGEST_BYTES."""

    round: Count
    seq: Count
    batches: Annotated[tuple[tuple[bytes, bytes], ...], Meta(max_length=64)]


class Report(Message, frozen=True):
    """A worker's load, pushed every snapshot period by a thread that runs while a long step computes: the heartbeat.
    seq rises with every report of an epoch. prefixes: None where there is no prefix cache."""

    epoch: str
    seq: Count
    load: WorkerLoad
    prefixes: PrefixDigest | None = None


class WorkerDeltas(Message, frozen=True):
    """New tokens.

    Attributes:
        plain: (request id, token ids) of requests that go on.
        full: all others, applied after.
        last_dispatch_seq: the last dispatch that the worker had seen by then; tokens of a request that was dispatched
            to it once more after that are of the attempt before, and not wanted.
    """

    epoch: str
    plain: tuple[tuple[str, tuple[int, ...]], ...]
    full: tuple[TokenDelta, ...] = ()
    last_dispatch_seq: Count = 2**53


class Leaving(Message, frozen=True):
    """A worker that ends by itself: draining, or with a cause when it failed."""

    epoch: str
    cause: str | None = None


class Findings(Message, frozen=True):
    """What a worker knows of what was asked; passed on to the client by the router. request: None if it knows no such
    request, or none was asked for."""

    client: bytes
    query: int
    worker_id: str
    steps: tuple[StepHistory, ...] = ()
    request: RequestHistory | None = None


# ---- router -> worker -------------------------------------------------------------------------------------------


class Dispatch(Message, frozen=True):
    """Serve this request. seq rises by one with every dispatch to this epoch of the worker."""

    seq: int
    request: EngineRequest


class Cancel(Message, frozen=True):
    """Stop working on a request; no answer is expected."""

    request_id: str


class RepeatPrefixes(Message, frozen=True):
    """Batches of the digest of its prefix cache are missing: begin a new round."""


class Reregister(Message, frozen=True):
    """The router does not know this worker (it was restarted): say Starting or Ready again."""

    router_epoch: str


class Ask(Message, frozen=True):
    """A client asks every worker for its newest steps, or for what it remembers of a request; each answers with
    `Findings`. query: the client's number for it. client: filled in by the router."""

    query: Count
    last_steps: Count = 0
    request_id: str | None = None
    client: bytes = b""


# ---- client -> router -------------------------------------------------------------------------------------------


class Hello(Message, frozen=True):
    """A client's first message, and its heartbeat; answered with `Cluster`. A client silent for long is forgotten and
    its requests are cancelled; it learns so from the `session` of the next Cluster. submitted: how many requests it has
    submitted before this message."""

    protocol: int = PROTOCOL_VERSION
    submitted: Count = 0


class Submit(Message, frozen=True):
    """Serve this request. number: how many requests this client has submitted before it."""

    request: EngineRequest
    number: Count = 0


class Abort(Message, frozen=True):
    request_id: str


# ---- router -> client -------------------------------------------------------------------------------------------


class Deltas(Message, frozen=True):
    """As WorkerDeltas. A request's last delta has a finish_reason."""

    plain: tuple[tuple[str, tuple[int, ...]], ...]
    full: tuple[TokenDelta, ...] = ()


class WorkerStatus(msgspec.Struct, frozen=True, array_like=True):
    """A worker as the router sees it. outstanding: requests dispatched and not finished, from the router's ledger.
    ejected: why it gets no requests although it is ready; None if it does."""

    info: WorkerInfo
    state: WorkerState
    phase: str
    fraction: float
    outstanding: int
    load: WorkerLoad | None
    restarts: int = 0
    cause: str | None = None
    ejected: str | None = None


class Cluster(Message, frozen=True):
    """All workers, pushed to clients every snapshot period and at every change of state.

    router_epoch, session: of the router process, and of its acquaintance with this client. Where either has changed
    (the router was restarted, or forgot a client that was silent), the client's requests whose number is below `since`
    are lost.
    held: requests the router holds because no worker can take them. ledger: requests in flight in all.
    counters: of the router since it started, by name (see server.metrics).
    """

    router_epoch: str
    workers: tuple[WorkerStatus, ...]
    held: int = 0
    ledger: int = 0
    counters: dict[str, float] = {}
    session: int = 0
    since: int = 0


# ---- router -> anybody ------------------------------------------------------------------------------------------


class Refused(Message, frozen=True):
    """The router does not talk to a peer that speaks another version of the protocol."""

    reason: str


ToRouterFromWorker = Starting | Ready | Report | WorkerDeltas | Leaving | Findings
ToWorker = Dispatch | Cancel | Reregister | RepeatPrefixes | Ask | Refused
ToRouterFromClient = Hello | Submit | Abort | Ask
ToClient = Deltas | Cluster | Findings | Refused

_encoder = msgspec.msgpack.Encoder()
_decoders = {
    union: msgspec.msgpack.Decoder(union) for union in (ToRouterFromWorker, ToWorker, ToRouterFromClient, ToClient)
}


def encode(message: Message) -> bytes:
    return _encoder.encode(message)


def _decode(frame: bytes | memoryview, union: object) -> object:
    if len(frame) > MAX_MESSAGE_BYTES:
        raise ProtocolError(f"a message of {len(frame)} bytes is over the limit of {MAX_MESSAGE_BYTES}")
    try:
        return _decoders[union].decode(frame)  # type: ignore[index]
    except (msgspec.DecodeError, ValueError, OverflowError, RecursionError) as error:  # ValueError: text not in UTF-8
        raise ProtocolError(f"not a message of protocol {PROTOCOL_VERSION}: {error}") from None


def decode_from_worker(frame: bytes | memoryview) -> ToRouterFromWorker:
    """Raises ProtocolError; so do the three below."""
    return _decode(frame, ToRouterFromWorker)  # type: ignore[return-value]


def decode_for_worker(frame: bytes | memoryview) -> ToWorker:
    return _decode(frame, ToWorker)  # type: ignore[return-value]


def decode_from_client(frame: bytes | memoryview) -> ToRouterFromClient:
    return _decode(frame, ToRouterFromClient)  # type: ignore[return-value]


def decode_for_client(frame: bytes | memoryview) -> ToClient:
    return _decode(frame, ToClient)  # type: ignore[return-value]


Split = tuple[tuple[tuple[str, tuple[int, ...]], ...], tuple[TokenDelta, ...]]


def split_deltas(deltas: Iterable[TokenDelta]) -> Split:
    """Into the (plain, full) of WorkerDeltas and Deltas: most tokens travel as an id and a few integers."""
    plain: list[tuple[str, tuple[int, ...]]] = []
    full: list[TokenDelta] = []
    for delta in deltas:
        if delta.finish_reason is None and delta.logprobs is None and delta.timings is None and delta.service is None:
            plain.append((delta.request_id, delta.token_ids))
        else:
            full.append(delta)
    return tuple(plain), tuple(full)


def join_deltas(plain: Iterable[tuple[str, tuple[int, ...]]], full: Iterable[TokenDelta]) -> list[TokenDelta]:
    """The inverse of `split_deltas`, plain ones first."""
    return [TokenDelta(request_id, token_ids) for request_id, token_ids in plain] + list(full)


def identity_of(worker_id: str, epoch: str) -> bytes:
    """The ZeroMQ identity of a worker process."""
    return f"{worker_id}.{epoch}".encode()
