"""Streams: the client is watched, a slow one is waited for but not for ever, and nothing keeps running behind it."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator, Callable
from contextlib import aclosing
from typing import Any

import msgspec
import pytest
from starlette.types import Message

from nexusengine.errors import Cancelled, InvalidRequest
from nexusengine.server.streams import Event, EventStream, fan_in, while_present
from nexusengine.types import RequestOutput


class Client:
    """The two ends of an ASGI connection. `leaves` is when it disconnects; `takes` limits the messages it reads."""

    def __init__(self, takes: int | None = None) -> None:
        self.leaves = asyncio.Event()
        self.sent: list[Message] = []
        self._takes = takes

    async def receive(self) -> Message:
        await self.leaves.wait()
        return {"type": "http.disconnect"}

    async def send(self, message: Message) -> None:
        if self._takes is not None and len(self.sent) >= self._takes:
            await asyncio.Event().wait()
        self.sent.append(message)

    @property
    def text(self) -> str:
        return b"".join(m.get("body", b"") for m in self.sent).decode()


class Events:
    """A generator of events that knows whether it was closed."""

    def __init__(self, count: int | None = None, error: Exception | None = None) -> None:
        self.closed, self.given = False, 0
        self._count, self._error = count, error

    async def generate(self) -> AsyncGenerator[dict[str, Any]]:
        try:
            while self._count is None or self.given < self._count:
                self.given += 1
                yield {"n": self.given}
                await asyncio.sleep(0)
            if self._error is not None:
                raise self._error
            if self._count is None:
                await asyncio.Event().wait()
        finally:
            self.closed = True


async def stream(client: Client, events: Events, stall_s: float = 5.0) -> None:
    reply = EventStream(events.generate(), {"x-mine": "1"}, stall_s=stall_s)
    await reply({"type": "http"}, client.receive, client.send)


async def test_events_then_done() -> None:
    client, events = Client(), Events(2)
    await stream(client, events)
    assert client.text == 'data: {"n":1}\n\ndata: {"n":2}\n\ndata: [DONE]\n\n'
    headers = dict(client.sent[0]["headers"])
    assert headers[b"content-type"].startswith(b"text/event-stream")
    assert headers[b"x-mine"] == b"1"
    assert b"content-length" not in headers
    assert events.closed


async def test_an_error_before_the_first_event_is_raised_so_that_it_becomes_a_plain_reply() -> None:
    with pytest.raises(InvalidRequest):
        await stream(Client(), events := Events(0, InvalidRequest("no")))
    assert events.closed


@pytest.mark.parametrize(
    ("error", "code"), [(InvalidRequest("too long"), "invalid_value"), (ValueError("secret"), "internal_error")]
)
async def test_an_error_after_the_first_event_is_an_event_and_there_is_no_done(error: Exception, code: str) -> None:
    client = Client()
    await stream(client, events := Events(1, error))
    assert f'"code":"{code}"' in client.text
    assert "[DONE]" not in client.text
    assert "secret" not in client.text
    assert client.sent[-1].get("more_body", False) is False
    assert events.closed


async def test_a_client_that_leaves_a_stream_ends_its_events() -> None:
    client, events = Client(), Events()
    running = asyncio.create_task(stream(client, events))
    while len(client.sent) < 5:
        await asyncio.sleep(0)
    client.leaves.set()
    await asyncio.wait_for(running, 5)
    assert events.closed


async def test_a_client_that_leaves_before_the_first_event_ends_what_was_started() -> None:
    client, started, ended = Client(), asyncio.Event(), asyncio.Event()

    async def never() -> AsyncGenerator[dict[str, Any]]:
        started.set()
        try:
            await asyncio.Event().wait()
            yield {}
        finally:
            ended.set()

    reply = EventStream(never(), {}, stall_s=5.0)
    beginning = asyncio.create_task(reply({"type": "http"}, client.receive, client.send))
    await started.wait()
    client.leaves.set()
    with pytest.raises(Cancelled):
        await asyncio.wait_for(beginning, 5)
    assert ended.is_set()


async def test_a_client_that_takes_nothing_is_waited_for_and_then_given_up() -> None:
    client, events = Client(takes=4), Events()
    await asyncio.wait_for(stream(client, events, stall_s=0.1), 5)
    assert len(client.sent) == 4
    assert events.given <= 5
    assert events.closed


async def test_a_slow_client_that_takes_every_event_in_time_gets_them_all() -> None:
    """The limit is one event's, not the stream's: ten of them take longer than it."""
    client, events = Client(), Events(10)

    async def send(message: Message) -> None:
        await asyncio.sleep(0.05)
        await client.send(message)

    reply = EventStream(events.generate(), {}, stall_s=0.4)
    await asyncio.wait_for(reply({"type": "http"}, client.receive, send), 5)
    assert client.text.endswith('data: {"n":10}\n\ndata: [DONE]\n\n')


async def test_a_pause_between_events_is_no_stall() -> None:
    client = Client()
    await EventStream(slow(2), {}, stall_s=0.03)({"type": "http"}, client.receive, client.send)
    assert client.text == 'data: {"n":0}\n\ndata: {"n":1}\n\ndata: [DONE]\n\n'


async def test_an_event_may_be_json_already() -> None:
    async def events() -> AsyncGenerator[Event]:
        yield msgspec.Raw(b'{"n":1}')

    client = Client()
    await EventStream(events(), {}, stall_s=5.0)({"type": "http"}, client.receive, client.send)
    assert client.text == 'data: {"n":1}\n\ndata: [DONE]\n\n'


async def test_work_ends_when_the_client_leaves_and_its_result_comes_through_when_it_stays() -> None:
    client, cancelled = Client(), asyncio.Event()

    async def work(seconds: float) -> str:
        try:
            await asyncio.sleep(seconds)
        except asyncio.CancelledError:
            cancelled.set()
            raise
        return "done"

    async with while_present(client.receive):
        assert await work(0) == "done"
    client.leaves.set()
    with pytest.raises(Cancelled):
        async with while_present(client.receive):
            await work(60)
    assert cancelled.is_set()
    await asyncio.sleep(0)  # the task that was cancelled for it goes on


async def test_what_is_cancelled_by_others_while_its_client_is_there_is_not_taken_for_a_client_that_left() -> None:
    async def work() -> None:
        async with while_present(Client().receive):
            await asyncio.sleep(60)

    working = asyncio.create_task(work())
    await asyncio.sleep(0)
    working.cancel()
    with pytest.raises(asyncio.CancelledError):
        await working


async def test_a_time_limit_inside_is_told_from_a_client_that_left() -> None:
    with pytest.raises(TimeoutError):
        async with while_present(Client().receive), asyncio.timeout(0.01):
            await asyncio.sleep(60)


class Generation:
    """A generation that counts what it gave and knows whether it was closed."""

    def __init__(self, count: int, fails_after: int | None = None) -> None:
        self.given, self.closed = 0, False
        self._count, self._fails_after = count, fails_after

    async def generate(self) -> AsyncGenerator[RequestOutput]:
        try:
            for i in range(self._count):
                if i == self._fails_after:
                    raise InvalidRequest("failed")
                self.given += 1
                yield RequestOutput("r", (), str(i), (i,), "length" if i + 1 == self._count else None)
        finally:
            self.closed = True


async def settle(condition: Callable[[], bool] = lambda: False) -> None:
    for _ in range(200):
        if condition():
            return
        await asyncio.sleep(0)


async def test_fan_in_gives_all_news_of_all_generations_each_in_order() -> None:
    made = [Generation(5), Generation(30), Generation(1)]
    seen: list[list[str]] = [[], [], []]
    async with fan_in([g.generate() for g in made]) as news:
        async for index, output in news:
            seen[index].append(output.text)
    assert seen == [[str(i) for i in range(n)] for n in (5, 30, 1)]
    assert all(g.closed for g in made)


async def test_fan_in_makes_generations_wait_for_a_slow_consumer() -> None:
    made = [Generation(10_000) for _ in range(4)]
    async with fan_in([g.generate() for g in made]) as news, aclosing(news):  # type: ignore[type-var]
        await anext(news)
        await settle()
        assert sum(g.given for g in made) < 50
    assert all(g.closed for g in made)


async def test_when_one_generation_fails_all_of_them_end() -> None:
    made = [Generation(10_000), Generation(10, fails_after=3)]

    async def consume() -> None:
        async with fan_in([g.generate() for g in made]) as news:
            async for _ in news:
                pass

    with pytest.raises(InvalidRequest):
        await consume()
    assert all(g.closed for g in made)


async def slow(pauses: int, error: Exception | None = None) -> AsyncGenerator[dict[str, Any]]:
    for n in range(pauses):
        await asyncio.sleep(0.1)
        yield {"n": n}
    await asyncio.sleep(0.1)
    if error is not None:
        raise error


async def test_silence_before_and_between_events_is_broken_by_comments() -> None:
    client = Client()
    await EventStream(slow(2), {}, stall_s=5.0, keepalive_s=0.03)({"type": "http"}, client.receive, client.send)
    assert client.sent[0]["type"] == "http.response.start"
    pieces = client.text.strip().split("\n\n")
    assert [p for p in pieces if p != ": keepalive"] == ['data: {"n":0}', 'data: {"n":1}', "data: [DONE]"]
    assert pieces[0] == pieces[pieces.index('data: {"n":0}') + 1] == pieces[-2] == ": keepalive"
    assert sum(m["type"] == "http.response.start" for m in client.sent) == 1
    assert [m.get("more_body") for m in client.sent[1:]] == [True] * (len(pieces) - 1) + [False]


async def test_a_stream_that_is_never_silent_has_no_comments() -> None:
    client = Client()
    await EventStream(slow(2), {}, stall_s=5.0, keepalive_s=5.0)({"type": "http"}, client.receive, client.send)
    assert "keepalive" not in client.text


async def test_an_error_that_comes_after_a_comment_is_an_event_and_one_before_is_raised() -> None:
    client = Client()
    stream = EventStream(slow(0, InvalidRequest("no")), {}, stall_s=5.0, keepalive_s=0.03)
    await stream({"type": "http"}, client.receive, client.send)
    assert client.text.startswith(": keepalive\n\n")
    assert '"code":"invalid_value"' in client.text
    assert client.sent[-1]["more_body"] is False
    with pytest.raises(InvalidRequest):
        await EventStream(slow(0, InvalidRequest("no")), {}, stall_s=5.0, keepalive_s=5.0)(
            {"type": "http"}, Client().receive, Client().send
        )


async def test_a_client_that_leaves_during_comments_ends_the_stream() -> None:
    client, ended = Client(), asyncio.Event()

    async def never() -> AsyncGenerator[dict[str, Any]]:
        try:
            await asyncio.Event().wait()
            yield {}
        finally:
            ended.set()

    streaming = asyncio.create_task(
        EventStream(never(), {}, stall_s=5.0, keepalive_s=0.01)({"type": "http"}, client.receive, client.send)
    )
    while len(client.sent) < 3:
        await asyncio.sleep(0.01)
    client.leaves.set()
    await asyncio.wait_for(streaming, 5)
    assert ended.is_set()
    sent = len(client.sent)
    await asyncio.sleep(0.05)
    assert len(client.sent) == sent


async def test_many_generations_are_not_all_started_in_one_turn_of_the_loop() -> None:
    """Each start takes some tenths of a millisecond: a thousand of them would hold up everybody else."""
    turn, started_in = 0, []

    async def generate() -> AsyncGenerator[RequestOutput]:
        started_in.append(turn)
        yield RequestOutput("r", (), "", (), "length")

    async def count() -> None:
        nonlocal turn
        while True:
            turn += 1
            await asyncio.sleep(0)

    counting = asyncio.create_task(count())
    async with fan_in([generate() for _ in range(200)]) as news:
        assert len([item async for item in news]) == 200
    counting.cancel()
    assert max(started_in.count(t) for t in set(started_in)) <= 8
