"""Messages between a worker and the router."""

from __future__ import annotations

from typing import Annotated

import msgspec
from msgspec import Meta

from nexusengine.types import EngineRequest, TokenDelta
from nexusengine.wire.base import PROTOCOL_VERSION, Count, Message
from nexusengine.wire.load import WorkerInfo, WorkerLoad

# ---- worker -> router -------------------------------------------------------------------------------------------


class Starting(Message, frozen=True):
    """A worker that is not ready yet; also its heartbeat.

    Attributes:
        phase: "loading weights", for example.
        fraction: of it done, 0..1.
    """

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
    """Changes of a worker's prefix cache; see `kv.digest.DigestSender`.

    Attributes:
        round: rises where the worker begins anew.
        seq: number of the last batch.
        batches: block hashes that came and block hashes that went, 8 bytes each; all together at most MAX_DIGEST_BYTES.
    """

    round: Count
    seq: Count
    batches: Annotated[tuple[tuple[bytes, bytes], ...], Meta(max_length=64)]


class Report(Message, frozen=True):
    """A worker's load and its heartbeat, sent every snapshot period by a thread that runs while a long step computes.

    Attributes:
        seq: rises with every report of a process.
        prefixes: None where there is no prefix cache.
    """

    seq: Count
    load: WorkerLoad
    prefixes: PrefixDigest | None = None


class WorkerDeltas(Message, frozen=True):
    """New tokens of a worker's requests.

    Attributes:
        plain: (request id, token ids) of requests that go on.
        full: all others, applied after.
        last_dispatch_seq: the last dispatch that the worker had seen by then; tokens of a request that was dispatched
            to it again after that are of the attempt before, and not wanted.
    """

    plain: tuple[tuple[str, tuple[int, ...]], ...]
    full: tuple[TokenDelta, ...] = ()
    last_dispatch_seq: Count = 2**53


class Leaving(Message, frozen=True):
    """A worker ends by itself: drained, or with a cause when it failed."""

    cause: str | None = None


# ---- router -> worker -------------------------------------------------------------------------------------------


class Dispatch(Message, frozen=True):
    """Serve this request.

    Attributes:
        seq: rises by one with every dispatch to this process of the worker.
    """

    seq: int
    request: EngineRequest


class Cancel(Message, frozen=True):
    """Stop working on a request; there is no reply."""

    request_id: str


class RepeatPrefixes(Message, frozen=True):
    """Batches of the digest of its prefix cache are missing: begin a new round."""


class Reregister(Message, frozen=True):
    """The router does not know this worker (it was restarted): send Starting or Ready again."""


def identity_of(worker_id: str, epoch: str) -> bytes:
    """The ZeroMQ identity of a worker process."""
    return f"{worker_id}.{epoch}".encode()
