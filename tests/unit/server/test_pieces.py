"""Long work and long replies in pieces."""

from __future__ import annotations

import asyncio
from collections.abc import Callable

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from starlette.types import Message

from nexusengine.server.pieces import JSONPieces, LoopYield


def sent(parts: list[bytes]) -> list[Message]:
    messages: list[Message] = []

    async def send(message: Message) -> None:
        messages.append(message)

    async def receive() -> Message:
        raise AssertionError("nothing is awaited of the client")

    asyncio.run(JSONPieces(parts, {"x-mine": "1"})({"type": "http"}, receive, send))
    return messages


@settings(max_examples=50, deadline=None)
@given(
    st.lists(st.sampled_from([b"", b"a", b"b" * 1000, b"c" * 2**18, b"d" * (2**18 + 1), b"e" * 700_000]), max_size=8)
)
def test_the_pieces_of_a_reply_add_up_and_none_is_long(parts: list[bytes]) -> None:
    start, *body = sent(parts)
    assert dict(start["headers"])[b"content-length"] == str(len(b"".join(parts))).encode()
    assert dict(start["headers"])[b"content-type"] == b"application/json"
    assert dict(start["headers"])[b"x-mine"] == b"1"
    assert b"".join(message["body"] for message in body) == b"".join(parts)
    assert all(len(message["body"]) <= 2**19 for message in body)
    assert [message.get("more_body", False) for message in body] == [True] * (len(body) - 1) + [False]


@pytest.mark.parametrize(("step_s", "turns"), [(0.01, 20), (0.001, 2)])
def test_others_get_their_turn_after_every_few_milliseconds_of_work(
    step_s: float, turns: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """20 steps of work, by a clock that goes on by `step_s` each time it is asked."""
    now_s = 0.0

    def clock() -> float:
        nonlocal now_s
        now_s += step_s
        return now_s

    seen: list[int] = []

    async def others() -> None:
        while True:
            seen.append(1)
            await asyncio.sleep(0)

    async def work(make: Callable[[], LoopYield]) -> None:
        task = asyncio.ensure_future(others())
        await asyncio.sleep(0)
        seen.clear()
        monkeypatch.setattr("time.monotonic", clock)
        rest = make().yield_if_due
        for _ in range(20):
            await rest()
        monkeypatch.undo()
        task.cancel()

    asyncio.run(work(LoopYield))
    assert turns <= len(seen) <= turns + 2
