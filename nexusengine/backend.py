"""What stands between text and tokens: something that serves EngineRequests. Local (a core in this process) or remote
(the router). The HTTP server, Engine and AsyncEngine see only this protocol."""

from __future__ import annotations

from collections.abc import Callable
from typing import Protocol

from nexusengine.types import EngineRequest, TokenDelta
from nexusengine.wire import Cluster, Findings

Sink = Callable[[TokenDelta], None]
"""Called in the event loop's thread with each delta of a request; the last one has a finish_reason."""


class AsyncBackend(Protocol):
    """Serves requests from one event loop. Every request submitted gets exactly one delta with a finish_reason: also
    when it is aborted, its worker dies, or the backend is closed."""

    async def start(self) -> None: ...

    def submit(self, request: EngineRequest, sink: Sink) -> None:
        """Errors of the request itself (too long, queue full) arrive through the sink, not as exceptions."""
        ...

    def abort(self, request_id: str) -> None:
        """Unknown or finished ids are ignored. The sink then gets finish_reason "abort"."""
        ...

    def status(self) -> Cluster | None:
        """The newest picture of workers and queues; None before the first."""
        ...

    async def ask(self, *, last_steps: int = 0, request_id: str | None = None) -> list[Findings]:
        """What every worker remembers of its newest steps, or of a request; without those that do not answer in time.
        Raises Unavailable if nobody can be asked."""
        ...

    async def close(self) -> None: ...
