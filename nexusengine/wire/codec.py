"""Messages to frames and back."""

from __future__ import annotations

import msgspec

from nexusengine.wire.base import MAX_MESSAGE_BYTES, PROTOCOL_VERSION, Message, ProtocolError
from nexusengine.wire.client import Abort, Cluster, Deltas, Hello, Refused, Submit
from nexusengine.wire.history import DebugQuery, DebugReply
from nexusengine.wire.worker import (
    Cancel,
    Dispatch,
    Leaving,
    Ready,
    RepeatPrefixes,
    Report,
    Reregister,
    Starting,
    WorkerDeltas,
)

ToRouterFromWorker = Starting | Ready | Report | WorkerDeltas | Leaving | DebugReply
ToWorker = Dispatch | Cancel | Reregister | RepeatPrefixes | DebugQuery | Refused
ToRouterFromClient = Hello | Submit | Abort | DebugQuery
ToClient = Deltas | Cluster | DebugReply | Refused

_encoder = msgspec.msgpack.Encoder()
_decoders = {
    union: msgspec.msgpack.Decoder(union) for union in (ToRouterFromWorker, ToWorker, ToRouterFromClient, ToClient)
}


def encode(message: Message) -> bytes:
    """A message as one frame."""
    return _encoder.encode(message)


def _decode(frame: bytes | memoryview, union: object) -> object:
    if len(frame) > MAX_MESSAGE_BYTES:
        raise ProtocolError(f"a message of {len(frame)} bytes is over the limit of {MAX_MESSAGE_BYTES}")
    try:
        return _decoders[union].decode(frame)  # type: ignore[index]
    except (msgspec.DecodeError, ValueError, OverflowError, RecursionError) as error:  # ValueError: text not in UTF-8
        raise ProtocolError(f"not a message of protocol {PROTOCOL_VERSION}: {error}") from None


def decode_from_worker(frame: bytes | memoryview) -> ToRouterFromWorker:
    """A worker's message to the router. Raises ProtocolError."""
    return _decode(frame, ToRouterFromWorker)  # type: ignore[return-value]


def decode_for_worker(frame: bytes | memoryview) -> ToWorker:
    """The router's message to a worker. Raises ProtocolError."""
    return _decode(frame, ToWorker)  # type: ignore[return-value]


def decode_from_client(frame: bytes | memoryview) -> ToRouterFromClient:
    """A client's message to the router. Raises ProtocolError."""
    return _decode(frame, ToRouterFromClient)  # type: ignore[return-value]


def decode_for_client(frame: bytes | memoryview) -> ToClient:
    """The router's message to a client. Raises ProtocolError."""
    return _decode(frame, ToClient)  # type: ignore[return-value]
