"""The contract of what serves EngineRequests: a core in this process, or the router and its workers.

The HTTP server, Engine and AsyncEngine see only this protocol.
"""

from __future__ import annotations

import asyncio
import heapq
import math
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Protocol

from nexusengine.errors import DeadlineExceeded, NexusError, Unavailable
from nexusengine.slo.due import first_token_due_s
from nexusengine.types import EngineRequest, TokenDelta
from nexusengine.wire import Cluster, DebugReply

Sink = Callable[[TokenDelta], None]
"""Called in the event loop's thread with each delta of a request; the last one has a finish_reason."""


class AsyncBackend(Protocol):
    """Serves requests from one event loop.

    Every request submitted gets exactly one delta with a finish_reason: also when it is aborted, its worker dies, or
    the backend is closed.
    """

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

    async def ask(self, *, last_steps: int = 0, request_id: str | None = None) -> list[DebugReply]:
        """Ask every worker what it remembers of its newest steps, or of a request.

        Returns:
            The replies that come in time.

        Raises:
            Unavailable: no worker can be asked.
        """
        ...

    async def close(self) -> None: ...

    def drop(self) -> None:
        """`close` without waiting; in the event loop."""
        ...


@dataclass(order=True, slots=True)
class _Waiting:
    """A request before the queue; `number` in order of submission."""

    due_s: float
    number: int
    request: EngineRequest = field(compare=False)
    sink: Sink = field(compare=False)
    expiry: asyncio.TimerHandle | None = field(compare=False, default=None)


class UnboundedBackend:
    """A backend that takes any number of requests, over one whose queue is bounded.

    Those beyond `places` wait before it, ordered by the time their first token is due, those without an SLO last, as
    they came. For callers in Python, who have all their prompts at hand anyway; a server refuses what its queue cannot
    hold.

    Args:
        places: most requests in `inner` at a time.
    """

    def __init__(self, inner: AsyncBackend, places: int) -> None:
        self.inner, self._places = inner, places
        self._inside = self._submitted = 0
        self._heap: list[_Waiting] = []
        self._waiting: dict[str, _Waiting] = {}
        self._letting_in = False

    async def start(self) -> None:
        await self.inner.start()

    def submit(self, request: EngineRequest, sink: Sink) -> None:
        waiting = _Waiting(first_token_due_s(request.arrival_s, request.slo), self._submitted, request, sink)
        self._submitted += 1
        self._waiting[request.request_id] = waiting
        heapq.heappush(self._heap, waiting)
        self._let_in()
        if request.deadline_s is not None and request.request_id in self._waiting:
            left_s = max(request.deadline_s - time.monotonic(), 0.0)
            waiting.expiry = asyncio.get_running_loop().call_later(left_s, self._expire, request)

    def abort(self, request_id: str) -> None:
        if request_id in self._waiting:
            self._end(request_id, TokenDelta(request_id, finish_reason="abort"))
        else:
            self.inner.abort(request_id)

    def status(self) -> Cluster | None:
        return self.inner.status()

    async def ask(self, *, last_steps: int = 0, request_id: str | None = None) -> list[DebugReply]:
        return await self.inner.ask(last_steps=last_steps, request_id=request_id)

    async def close(self) -> None:
        self._end_waiting()
        await self.inner.close()

    def drop(self) -> None:
        self._end_waiting()
        self.inner.drop()

    def _end_waiting(self) -> None:
        for request_id in list(self._waiting):
            self._end(request_id, TokenDelta.failed(request_id, Unavailable("the engine was closed")))

    def _let_in(self) -> None:
        """Submit requests from the heap while there are places.

        A sink may be called before `submit` returns, and calls this again: the outermost call does the work.
        """
        if self._letting_in:
            return
        self._letting_in = True
        try:
            while self._heap and self._inside < self._places:
                waiting = heapq.heappop(self._heap)
                if self._forget(waiting.request.request_id) is not None:
                    self._submit(waiting.request, waiting.sink)
        finally:
            self._letting_in = False

    def _submit(self, request: EngineRequest, sink: Sink) -> None:
        def forward(delta: TokenDelta) -> None:
            if delta.finish_reason is not None:
                self._inside -= 1
                self._let_in()
            sink(delta)

        self._inside += 1
        try:
            self.inner.submit(request, forward)
        except NexusError as error:
            forward(TokenDelta.failed(request.request_id, error))

    def _expire(self, request: EngineRequest) -> None:
        limit_s = (request.deadline_s or math.inf) - request.arrival_s
        error = DeadlineExceeded(f"not finished within {limit_s:.1f} s of its arrival")
        self._end(request.request_id, TokenDelta.failed(request.request_id, error))

    def _end(self, request_id: str, delta: TokenDelta) -> None:
        if (waiting := self._forget(request_id)) is not None:
            waiting.sink(delta)

    def _forget(self, request_id: str) -> _Waiting | None:
        """It waits no longer; its place in the heap is passed over."""
        waiting = self._waiting.pop(request_id, None)
        if waiting is not None and waiting.expiry is not None:
            waiting.expiry.cancel()
        return waiting
