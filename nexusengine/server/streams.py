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

_QUEUED_PIECES = 16
log = get_logger("server")


@asynccontextmanager
async def while_present(receive: Receive) -> AsyncIterator[None]:
    """What is inside is cancelled when the client leaves, and Cancelled raised: as asyncio.timeout does at its instant,
    so that nothing stands between the client and a task of its own that works for it."""
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
    """Server-sent events. The first event is awaited before the status is sent, so that an early error is raised and
    can become a plain JSON reply; a later one is an event, and the stream ends without [DONE].

    stall_s: a client that takes nothing for so long has its connection closed.
    """

    def __init__(self, events: AsyncGenerator[dict[str, Any]], headers: dict[str, str], stall_s: float) -> None:
        self.status_code, self.background, self.body = 200, None, b""
        self._events, self._stall_s = events, stall_s
        self.init_headers({**headers, "content-type": "text/event-stream; charset=utf-8", "cache-control": "no-cache"})
        del self.headers["content-length"]

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Raises what the generation raises before its first event, and Cancelled if the client leaves before."""
        begun = False
        try:
            async with while_present(receive), aclosing(self._events) as events:
                first = await anext(events)
                begun = True
                await self._write(send, first)
        except (Cancelled, OSError) as error:  # TimeoutError is an OSError
            if not begun:
                raise
            log.debug("a stream was cut off: %s", error)

    async def _write(self, send: Send, first: dict[str, Any]) -> None:
        await send({"type": "http.response.start", "status": 200, "headers": self.raw_headers})
        try:
            await self._event(send, first)
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

    async def _event(self, send: Send, event: dict[str, Any]) -> None:
        body = b"data: " + msgspec.json.encode(event) + b"\n\n"
        async with asyncio.timeout(self._stall_s):
            await send({"type": "http.response.body", "body": body, "more_body": True})
