"""Messages that the router is about to send. PURE."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

from nexusengine.types import TokenDelta
from nexusengine.wire import Deltas, Message, PlainDelta, split_deltas

_NONE: Mapping[bytes, Sequence[PlainDelta]] = {}


@dataclass(frozen=True, slots=True)
class Outgoing:
    """A message to send: to which side, to whom."""

    side: Literal["client", "worker"]
    identity: bytes
    message: Message


class Outbox:
    """Messages in the order in which they are to be sent."""

    def __init__(self) -> None:
        self._messages: list[Outgoing] = []

    def take(self) -> list[Outgoing]:
        """Those that came since the last call."""
        taken, self._messages = self._messages, []
        return taken

    def to_client(self, identity: bytes, message: Message) -> None:
        """Send to a client."""
        self._messages.append(Outgoing("client", identity, message))

    def to_worker(self, identity: bytes, message: Message) -> None:
        """Send to a worker process."""
        self._messages.append(Outgoing("worker", identity, message))

    def deltas(
        self, by_client: Mapping[bytes, Sequence[TokenDelta]], plain: Mapping[bytes, Sequence[PlainDelta]] = _NONE
    ) -> None:
        """Send new tokens and ends of requests, one message a client; the plain ones first."""
        for client in {**plain, **by_client}:
            further, full = split_deltas(by_client.get(client, ()))
            self.to_client(client, Deltas((*plain.get(client, ()), *further), full))
