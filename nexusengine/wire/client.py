"""Messages between a client (the HTTP server, an engine over several devices) and the router."""

from __future__ import annotations

import msgspec

from nexusengine.types import EngineRequest, TokenDelta
from nexusengine.wire.base import PROTOCOL_VERSION, Count, Message
from nexusengine.wire.load import WorkerStatus

# ---- client -> router -------------------------------------------------------------------------------------------


class Hello(Message, frozen=True):
    """A client's first message, and its heartbeat; answered with `Cluster`.

    A client silent for long is forgotten and its requests are cancelled; it learns so from the `session` of the next
    Cluster.

    Attributes:
        submitted: how many requests it has submitted before this message.
    """

    protocol: int = PROTOCOL_VERSION
    submitted: Count = 0


class Submit(Message, frozen=True):
    """Serve this request.

    Attributes:
        number: how many requests this client has submitted before it.
    """

    request: EngineRequest
    number: Count = 0


class Abort(Message, frozen=True):
    """End this request; its last delta has finish_reason "abort"."""

    request_id: str


# ---- router -> client -------------------------------------------------------------------------------------------


class Deltas(Message, frozen=True):
    """New tokens, as in WorkerDeltas. A request's last delta has a finish_reason."""

    plain: tuple[tuple[str, tuple[int, ...]], ...]
    full: tuple[TokenDelta, ...] = ()


class Cluster(Message, frozen=True):
    """All workers, sent to clients every snapshot period and at every change of state.

    Attributes:
        router_epoch, session: of the router process, and of its session with this client. Where either has changed (the
            router was restarted, or forgot a client that was silent), the client's requests whose number is below
            `since` are lost.
        held: requests that the router holds because no worker can take them.
        ledger: requests in flight in all.
        counters: of the router since it started, by name (see server.metrics).
    """

    router_epoch: str
    workers: tuple[WorkerStatus, ...]
    held: int = 0
    ledger: int = 0
    counters: dict[str, float] = msgspec.field(default_factory=dict)
    session: int = 0
    since: int = 0


# ---- router -> anybody ------------------------------------------------------------------------------------------


class Refused(Message, frozen=True):
    """The router does not talk to a peer that speaks another version of the protocol."""

    reason: str
