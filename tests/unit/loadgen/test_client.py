"""The open-loop client against servers that do right, and against those that do not."""

from __future__ import annotations

import asyncio
import json
import math
import time
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager

import pytest

from nexusengine.errors import ConfigError
from nexusengine.loadgen.client import run_open_loop
from nexusengine.loadgen.http import Target
from nexusengine.loadgen.items import WorkItem
from nexusengine.loadgen.record import Record
from nexusengine.types import SLO

Answer = Callable[[int, bytes, asyncio.StreamWriter], Awaitable[None]]
HEAD = b"HTTP/1.1 200 OK\r\ncontent-type: text/event-stream\r\ntransfer-encoding: chunked\r\n\r\n"


def chunk(text: str) -> bytes:
    return b"%x\r\n%b\r\n" % (len(text.encode()), text.encode())


def event(**fields: object) -> str:
    return f"data: {json.dumps(fields)}\n\n"


def token(text: str = "x", reason: str | None = None) -> str:
    return event(choices=[{"index": 0, "text": text, "finish_reason": reason}])


LAST = token("y", "length") + event(choices=[], usage={"completion_tokens": 3}, nexus={"met": True})
WHOLE = [chunk(token()), chunk(token()), chunk(LAST), chunk("data: [DONE]\n\n"), b"0\r\n\r\n"]


@asynccontextmanager
async def answering(answer: Answer) -> AsyncIterator[tuple[Target, list[int]]]:
    """A server that reads requests and leaves the answer to `answer(number, body, writer)`; and how many connections
    were made, by request."""
    made: list[int] = []

    async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        connection = len(set(made))
        try:
            while head := await reader.readuntil(b"\r\n\r\n"):
                length = next(int(h[15:]) for h in head.lower().split(b"\r\n") if h.startswith(b"content-length:"))
                body = await reader.readexactly(length)
                made.append(connection)
                await answer(len(made) - 1, body, writer)
        except (asyncio.IncompleteReadError, ConnectionError):
            pass
        finally:
            writer.close()

    server = await asyncio.start_server(serve, "127.0.0.1", 0)
    async with server:
        port = server.sockets[0].getsockname()[1]
        yield Target(f"http://127.0.0.1:{port}", "secret"), made


async def whole(number: int, body: bytes, writer: asyncio.StreamWriter) -> None:
    writer.write(HEAD + b"".join(WHOLE))


def items(*send_at_s: float) -> list[WorkItem]:
    return [WorkItem(t, 5, 3, SLO(5.0, 1.0), "standard") for t in send_at_s]


async def run(target: Target, work: list[WorkItem], timeout_s: float = 5.0) -> list[Record]:
    return await run_open_loop(target, work, [b'{"n":%d}' % i for i in range(len(work))], timeout_s=timeout_s)


async def test_an_answer_is_timed_and_counted_and_the_servers_account_is_kept() -> None:
    async with answering(whole) as (target, made):
        (record,) = await run(target, items(0.0))
    assert (record.error, record.status, record.events, record.output_tokens) == (None, 200, 3, 3)
    assert record.nexus == {"met": True}
    assert record.intended_s <= record.sent_s <= record.first_s <= record.last_s <= record.ended_s
    assert record.in_time
    assert made == [0]


async def test_an_event_may_come_in_any_pieces() -> None:
    async def bytewise(number: int, body: bytes, writer: asyncio.StreamWriter) -> None:
        for byte in HEAD + b"".join(WHOLE):
            writer.write(bytes([byte]))
            await writer.drain()

    async with answering(bytewise) as (target, _):
        (record,) = await run(target, items(0.0))
    assert (record.error, record.events, record.output_tokens) == (None, 3, 3)


async def test_requests_go_out_at_their_time_whatever_became_of_those_before() -> None:
    async def slow(number: int, body: bytes, writer: asyncio.StreamWriter) -> None:
        await asyncio.sleep(0.5)
        await whole(number, body, writer)

    async with answering(slow) as (target, made):
        began_s = time.monotonic()
        records = await run(target, items(0.2, 0.0, 0.1))
        took_s = time.monotonic() - began_s
    assert took_s < 3 * 0.5 + 0.3, "they were under way together"
    assert len(set(made)) == 3
    gaps = [records[0].intended_s - records[2].intended_s, records[2].intended_s - records[1].intended_s]
    assert gaps == pytest.approx([0.1, 0.1])
    assert all(r.late_s >= 0 and r.ttft_s >= 0.5 for r in records)


async def test_latency_counts_from_when_a_request_was_to_be_sent() -> None:
    async with answering(whole) as (target, _):
        work = items(0.0, 0.0)

        async def busy() -> None:
            await asyncio.sleep(0.1)
            time.sleep(0.4)  # the client itself is held up

        holding = asyncio.create_task(busy())
        records = await run(target, work)
        await holding
    for record in records:
        assert record.late_s > 0.2
        assert record.ttft_s > record.late_s


async def test_a_connection_is_used_again_and_replaced_once_the_server_has_closed_it() -> None:
    async def closing_after_the_second(number: int, body: bytes, writer: asyncio.StreamWriter) -> None:
        await whole(number, body, writer)
        if number == 1:
            await writer.drain()
            writer.close()

    async with answering(closing_after_the_second) as (target, made):
        records = await run(target, items(0.0, 0.15, 0.3))
    assert [r.error for r in records] == [None] * 3
    assert made == [0, 0, 1]


async def test_what_goes_wrong_is_named_by_its_kind() -> None:
    refusal = json.dumps({"error": {"code": "overloaded", "message": "full"}}).encode()

    async def answer(number: int, body: bytes, writer: asyncio.StreamWriter) -> None:
        kind = json.loads(body)["n"]
        if kind == 0:
            writer.write(b"HTTP/1.1 429 X\r\ncontent-length: %d\r\n\r\n%b" % (len(refusal), refusal))
        elif kind == 1:
            writer.write(HEAD + chunk(token()))
            await writer.drain()
            writer.close()
        elif kind == 2:
            failed = event(error={"code": "worker_lost", "message": "gone"})
            writer.write(HEAD + chunk(token()) + chunk(failed) + b"0\r\n\r\n")
        elif kind == 3:
            writer.write(HEAD + chunk(token()) + b"0\r\n\r\n")
        elif kind == 4:
            await asyncio.sleep(30)
        elif kind == 5:
            writer.write(b"HELLO\r\n\r\n")
        elif kind == 6:
            writer.write(HEAD + chunk("data: {nonsense\n\n") + b"0\r\n\r\n")
        else:
            writer.write(b"HTTP/1.1 500 X\r\ncontent-length: 4\r\n\r\noops")

    async with answering(answer) as (target, _):
        records = await run(target, items(*(0.05 * i for i in range(8))), timeout_s=1.0)
    assert [r.error for r in records] == [
        "http_429_overloaded",
        "broken_off",
        "stream_worker_lost",
        "incomplete",
        "timeout",
        "not_http",
        "not_http",
        "http_500",
    ]
    assert all(math.isfinite(r.ended_s) for r in records)


async def test_where_nobody_listens_every_request_says_so() -> None:
    async with answering(whole) as (target, _):
        pass
    records = await run(target, items(0.0, 0.01))
    assert {r.error for r in records} == {"refused_connection"}


async def test_a_token_that_comes_later_than_the_strict_contract_wants_is_noticed() -> None:
    async def halting(number: int, body: bytes, writer: asyncio.StreamWriter) -> None:
        writer.write(HEAD + WHOLE[0])
        await asyncio.sleep(0.3)
        writer.write(b"".join(WHOLE[1:]))

    async with answering(halting) as (target, _):
        strict, loose = await run(target, [WorkItem(0.0, 5, 3, SLO(0.2, 0.01)), WorkItem(0.0, 5, 3, SLO(0.2, 5.0))])
    assert (strict.in_time, loose.in_time) == (False, True)


def test_a_target_is_an_http_url() -> None:
    for url in ("https://x", "localhost:8000", "http://", ""):
        with pytest.raises(ConfigError, match="--url"):
            Target(url)
    head = Target("http://[::1]:81/base/", "k").request(b"{}")
    assert head.startswith(b"POST /base/v1/completions HTTP/1.1\r\nHost: [::1]:81\r\n")
    assert b"Authorization: Bearer k\r\n" in head
    assert head.endswith(b"Content-Length: 2\r\n\r\n{}")
