"""The clients that the router knows, each in a session: from its first message until it is silent for too long. PURE.

A client that was forgotten begins a new session with its next message, and learns from it which requests are lost.
"""

from __future__ import annotations

from dataclasses import dataclass

from msgspec.structs import replace

from nexusengine.wire import Cluster, Hello, Submit, ToRouterFromClient

CLIENT_SILENT_S = 15.0


@dataclass(slots=True)
class Session:
    """The session with one client.

    Attributes:
        seen_s: timestamp of its last message.
        number, since: `session` and `since` of Cluster.
    """

    seen_s: float
    number: int
    since: int

    def of(self, cluster: Cluster) -> Cluster:
        """The cluster's picture, as it is sent to this client."""
        return replace(cluster, session=self.number, since=self.since)


class Clients:
    """Sessions by the client's identity."""

    def __init__(self) -> None:
        self._sessions: dict[bytes, Session] = {}
        self._begun = 0

    def __contains__(self, identity: bytes) -> bool:
        return identity in self._sessions

    def items(self) -> list[tuple[bytes, Session]]:
        """All sessions with the identities of their clients."""
        return list(self._sessions.items())

    def heard(self, identity: bytes, message: ToRouterFromClient, now: float) -> tuple[Session | None, bool]:
        """Note a message of a client.

        Returns:
            The session with the client, None for one that is not known and neither says hello nor submits a request;
            and whether the message began it.
        """
        session = self._sessions.get(identity)
        if session is not None:
            session.seen_s = now
            return session, False
        if not isinstance(message, Hello | Submit):
            return None, False
        self._begun += 1
        since = message.submitted if isinstance(message, Hello) else message.number
        session = self._sessions[identity] = Session(now, self._begun, since)
        return session, True

    def forget(self, identity: bytes) -> None:
        """End the session, if there is one."""
        self._sessions.pop(identity, None)

    def silent(self, now: float) -> list[bytes]:
        """Clients that have been silent for too long."""
        return [identity for identity, s in self._sessions.items() if now - s.seen_s > CLIENT_SILENT_S]

    def paused(self, seconds: float) -> None:
        """Excuse everybody's silence of so long."""
        for session in self._sessions.values():
            session.seen_s += seconds
