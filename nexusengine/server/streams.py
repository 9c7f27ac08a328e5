"""Serving generations while watching the client: one disconnect ends everything that was started for it."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator, AsyncIterator, Sequence
from contextlib import aclosing, asynccontextmanager
from typing import Any

import msgspec
from starlette.responses import Response
from starlette.types import Receive, Scope, Send

from nexusengine.errors import Cancelled, InternalError, NexusError
from nexusengine.obs.logs import get_logger
from nexusengine.server.errors import SERVER_FAILED, error_body
from nexusengine.types import RequestOutput

Event = dict[str, Any] | msgspec.Raw
"""An object, or one that is JSON already."""

_QUEUED_PIECES = 16
_STARTED_A_TURN = 4
log = get_logger("server")


@asynccontextmanager
async def while_present(receive: Receive) -> AsyncIterator[None]:
    """Cancel the block when the client leaves, and raise Cancelled; as asyncio.timeout does at its time.

    So no further task stands between a client and the one that works for it.
    """
    task, left = asyncio.current_task(), False
    assert task is not None
    before = task.cancelling()

    async def watch() -> None:
        nonlocal left
        while (await receive())["type"] != "http.disconnect":
            pass
        left = True
        task.cancel()

    watcher = asyncio.ensure_future(watch())
    try:
        yield
    except asyncio.CancelledError:
        if left and task.cancelling() <= before + 1:
            raise Cancelled("the client left") from None
        raise
    finally:
        watcher.cancel()
        if left:
            task.uncancel()


@asynccontextmanager
async def fan_in(
    generations: Sequence[AsyncGenerator[RequestOutput]],
) -> AsyncIterator[AsyncIterator[tuple[int, RequestOutput]]]:
    """The outputs of several generations as one iterator of (which one, output); leaving the context ends them all.

    A consumer that is slow makes the generations wait; what they get meanwhile comes as one piece.
    """
    if len(generations) == 1:  # nothing to bring together, and two tasks less between a token and its client
        async with aclosing(generations[0]) as only:
            yield ((0, output) async for output in only)
        return
    queue: asyncio.Queue[tuple[int, RequestOutput] | Exception] = asyncio.Queue(_QUEUED_PIECES)

    async def pump(index: int, generation: AsyncGenerator[RequestOutput]) -> None:
        try:
            async with aclosing(generation) as outputs:
                async for output in outputs:
                    await queue.put((index, output))
        except Exception as error:  # handed to the consumer, who raises it
            await queue.put(error)

    async def consume() -> AsyncIterator[tuple[int, RequestOutput]]:
        left = len(generations)
        while left:
            item = await queue.get()
            if isinstance(item, Exception):
                raise item
            left -= item[1].finished
            yield item

    tasks: list[asyncio.Task[None]] = []
    try:
        for i, generation in enumerate(generations):
            tasks.append(asyncio.create_task(pump(i, generation)))
            if i % _STARTED_A_TURN == 0:  # a thousand of them would hold up the event loop
                await asyncio.sleep(0)
        yield consume()
    finally:
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)


class EventStream(Response):
    """Server-sent events.

    The status is sent with the first event, so that an early error is raised and can become a plain JSON reply; a later
    one is an event, and the stream ends without [DONE].

    keepalive_s: a stream that was silent for so long gets a comment, before the first event its status too; 0: never.
    stall_s: a client that takes nothing for so long has its connection closed.
    """

    def __init__(
        self,
        events: AsyncGenerator[Event],
        headers: dict[str, str],
        *,
        stall_s: float,
        keepalive_s: float = 0.0,
    ) -> None:
        self.status_code, self.background, self.body = 200, None, b""
        self._events, self._stall_s, self._keepalive_s = events, stall_s, keepalive_s
        self._begun, self._wrote = False, False
        self._sending_s: float | None = None  # the loop's time at which the event that is being sent was to be sent
        self.init_headers({**headers, "content-type": "text/event-stream; charset=utf-8", "cache-control": "no-cache"})
        del self.headers["content-length"]

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Raises what the generation raises while nothing was sent, and Cancelled if the client leaves before."""
        try:
            async with while_present(receive), self._comments(send), aclosing(self._events), self._stall_limit():
                await self._write(send)
        except (Cancelled, OSError) as error:  # TimeoutError is an OSError
            if not self._begun:
                raise
            log.debug("a stream was cut off: %s", error)

    async def _write(self, send: Send) -> None:
        try:
            async for event in self._events:
                await self._event(send, event)
            await self._send(send, b"data: [DONE]\n\n", last=True)
        except NexusError as error:
            if not self._begun:
                raise
            await self._event(send, error_body(error), last=True)
        except OSError:
            raise
        except Exception:
            if not self._begun:
                raise
            log.exception("a stream failed")
            await self._event(send, error_body(InternalError(SERVER_FAILED)), last=True)

    async def _event(self, send: Send, event: Event, *, last: bool = False) -> None:
        self._sending_s = self._clock()
        await self._send(send, b"data: " + msgspec.json.encode(event) + b"\n\n", last=last)
        self._sending_s = None

    async def _send(self, send: Send, body: bytes, *, last: bool = False) -> None:
        self._wrote = True
        if not self._begun:
            self._begun = True
            await send({"type": "http.response.start", "status": 200, "headers": self.raw_headers})
        await send({"type": "http.response.body", "body": body, "more_body": not last})

    @asynccontextmanager
    async def _stall_limit(self) -> AsyncIterator[None]:
        """Inside, no event may take longer than stall_s to send; raises TimeoutError if one does.

        One timer watches all events: setting one for each would cost as much as sending it.
        """
        loop = asyncio.get_running_loop()
        self._clock = loop.time
        timer: asyncio.TimerHandle
        async with asyncio.timeout(None) as limit:

            def look() -> None:
                nonlocal timer
                since_s = self._clock() if self._sending_s is None else self._sending_s
                if self._clock() - since_s >= self._stall_s:
                    limit.reschedule(since_s)
                else:
                    timer = loop.call_at(since_s + self._stall_s, look)

            timer = loop.call_later(self._stall_s, look)
            try:
                yield
            finally:
                timer.cancel()

    @asynccontextmanager
    async def _comments(self, send: Send) -> AsyncIterator[None]:
        """Inside, silence is broken."""

        async def watch() -> None:
            while True:
                self._wrote = False
                await asyncio.sleep(self._keepalive_s)
                if not self._wrote:
                    await self._send(send, b": keepalive\n\n")

        if not self._keepalive_s:
            yield
            return
        watcher = asyncio.ensure_future(watch())
        try:
            yield
        finally:
            watcher.cancel()
