"""Serving generations while watching the client: one disconnect ends everything that was started for it."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator, AsyncIterator, Awaitable, Sequence
from contextlib import aclosing, asynccontextmanager
from typing import Any, TypeVar

import msgspec
from starlette.requests import Request
from starlette.responses import Response
from starlette.types import Receive, Scope, Send

from nexusengine.errors import Cancelled, InternalError, NexusError
from nexusengine.obs.logs import get_logger
from nexusengine.server.errors import SERVER_FAILED, error_body
from nexusengine.types import RequestOutput

_QUEUED_PIECES = 16
T = TypeVar("T")
log = get_logger("server")


class Presence:
    """Whether the client of a request is still there, watched by a task until `end`."""

    def __init__(self, request: Request) -> None:
        self._request = request
        self._left = asyncio.ensure_future(self._watch())

    async def _watch(self) -> None:
        while (await self._request.receive())["type"] != "http.disconnect":
            pass

    async def during(self, work: Awaitable[T]) -> T:
        """The result of `work`; if the client leaves first, `work` is cancelled and Cancelled raised."""
        worker = asyncio.ensure_future(work)
        try:
            await asyncio.wait((self._left, worker), return_when=asyncio.FIRST_COMPLETED)
            if not worker.done():
                raise Cancelled("the client left")
            return worker.result()
        finally:
            await _ended(worker)

    async def end(self) -> None:
        await _ended(self._left)


async def _ended(task: asyncio.Future[Any]) -> None:
    if not task.done():
        task.cancel()
        await asyncio.gather(task, return_exceptions=True)


async def until_disconnect(request: Request, work: Awaitable[T]) -> T:
    """The result of `work`; if the client leaves first, `work` is cancelled and Cancelled raised."""
    presence = Presence(request)
    try:
        return await presence.during(work)
    finally:
        await presence.end()


@asynccontextmanager
async def fan_in(
    generations: Sequence[AsyncGenerator[RequestOutput]],
) -> AsyncIterator[AsyncIterator[tuple[int, RequestOutput]]]:
    """The news of several generations as one iterator of (which one, news); leaving the context ends them all.

    A consumer that is slow makes the generations wait; what they get meanwhile comes as one piece.
    """
    if len(generations) == 1:  # nothing to bring together, and two tasks less between a token and its client
        async with aclosing(generations[0]) as only:
            yield ((0, output) async for output in only)
        return
    news: asyncio.Queue[tuple[int, RequestOutput] | Exception] = asyncio.Queue(_QUEUED_PIECES)

    async def pump(index: int, generation: AsyncGenerator[RequestOutput]) -> None:
        try:
            async with aclosing(generation) as outputs:
                async for output in outputs:
                    await news.put((index, output))
        except Exception as error:  # handed to the consumer, who raises it
            await news.put(error)

    async def consume() -> AsyncIterator[tuple[int, RequestOutput]]:
        left = len(generations)
        while left:
            item = await news.get()
            if isinstance(item, Exception):
                raise item
            left -= item[1].finished
            yield item

    tasks = [asyncio.create_task(pump(i, g)) for i, g in enumerate(generations)]
    try:
        yield consume()
    finally:
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)


class EventStream(Response):
    """Server-sent events. The first event is awaited before the status is sent, so that an early error is a plain JSON
    reply (raised by `begin`); a later one is an event, and the stream ends without [DONE].

    stall_s: a client that takes nothing for so long has its connection closed.
    """

    def __init__(
        self, request: Request, events: AsyncGenerator[dict[str, Any]], headers: dict[str, str], stall_s: float
    ) -> None:
        self.status_code, self.background = 200, None
        self._presence, self._events, self._stall_s = Presence(request), events, stall_s
        self._first: dict[str, Any] | None = None
        self.body = b""
        self.init_headers({**headers, "content-type": "text/event-stream; charset=utf-8", "cache-control": "no-cache"})
        del self.headers["content-length"]

    async def begin(self) -> EventStream:
        """Wait for the first event. Raises what the generation raises, and Cancelled."""
        try:
            self._first = await self._presence.during(anext(self._events))
        except BaseException:
            await self._end()
            raise
        return self

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        try:
            await self._presence.during(self._write(send))
        except (Cancelled, OSError) as error:  # TimeoutError is an OSError
            log.debug("a stream was cut off: %s", error)
        finally:
            await self._end()

    async def _end(self) -> None:
        await self._presence.end()
        await self._events.aclose()

    async def _write(self, send: Send) -> None:
        await send({"type": "http.response.start", "status": 200, "headers": self.raw_headers})
        try:
            await self._event(send, self._first)
            async for event in self._events:
                await self._event(send, event)
            await send({"type": "http.response.body", "body": b"data: [DONE]\n\n"})
        except NexusError as error:
            await self._event(send, error_body(error))
            await send({"type": "http.response.body", "body": b""})
        except OSError:
            raise
        except Exception:
            log.exception("a stream failed")
            await self._event(send, error_body(InternalError(SERVER_FAILED)))
            await send({"type": "http.response.body", "body": b""})

    async def _event(self, send: Send, event: dict[str, Any] | None) -> None:
        body = b"data: " + msgspec.json.encode(event) + b"\n\n"
        async with asyncio.timeout(self._stall_s):
            await send({"type": "http.response.body", "body": body, "more_body": True})
