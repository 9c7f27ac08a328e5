"""Bodies are measured before they are parsed, and parsed where they hold nobody up."""

from __future__ import annotations

import json
import threading
from typing import Any

import pytest

from nexusengine.errors import InvalidRequest
from nexusengine.server.body import parse
from nexusengine.server.heavy import LARGE, SMALL, Heavy
from nexusengine.server.json_size import MAX_CONTAINERS, MAX_FIELDS, MAX_STRINGS, check_structure
from nexusengine.server.schemas import ChatRequest, CompletionRequest, DetokenizeRequest


@pytest.mark.parametrize(
    ("content", "word"),
    [
        (b"[" * 8_000_000, "arrays"),
        (b"[" + b"{}," * (MAX_CONTAINERS + 1) + b"1]", "objects"),
        (b"{" + b'"a":1,' * (MAX_FIELDS + 1) + b'"b":1}', "fields"),
        (b"[" + b'"",' * (MAX_STRINGS + 1) + b'""]', "strings"),
        (b'{"x\\\\":' + b"[" * (MAX_CONTAINERS + 1), "arrays"),
    ],
)
def test_structure_without_end_is_refused_before_it_is_parsed(content: bytes, word: str) -> None:
    with pytest.raises(InvalidRequest, match=word):
        check_structure(content)


@pytest.mark.parametrize(
    "text",
    [
        "[" * 100_000,
        '{"a": [1]}, ' * 100_000,
        '"' * 400_000,
        '\\"' * 200_000,
        "\\" * 100_001 + ":" * 60_000,
        '[":' * 60_000 + "\\",
    ],
)
def test_structure_that_is_text_is_read(text: str) -> None:
    content = json.dumps({"prompt": text, "stop": "\\"}).encode()
    check_structure(content)
    assert parse(content, CompletionRequest).prompt == text


def test_as_much_as_is_allowed_is_parsed() -> None:
    content = json.dumps({"prompt": ["a"] * (MAX_STRINGS - 1)}).encode()
    assert len(parse(content, CompletionRequest).prompt or "") == MAX_STRINGS - 1


def test_a_string_that_never_ends_is_left_to_the_parser() -> None:
    for content in (b'{"prompt": "' + b"[" * 60_000, b'{"prompt": "' + b"[" * 60_000 + b'\\"'):
        with pytest.raises(InvalidRequest, match="not valid JSON"):
            parse(content, CompletionRequest)


@pytest.mark.parametrize("number", [b"5", b"5.5", b"5e1", b"NaN"])
def test_other_threads_run_while_a_list_of_a_million_numbers_is_parsed(number: bytes) -> None:
    """json.loads in C alone would let none of them in."""
    content = b'{"tokens": [' + (number + b",") * 1_000_000 + number + b"]}"
    seen: list[int] = []
    done = threading.Event()

    def look() -> None:
        while not done.wait(0.0005):
            seen.append(1)

    looking = threading.Thread(target=look)
    looking.start()
    if number == b"5":
        assert len(parse(content, DetokenizeRequest).tokens) == 1_000_001
    else:
        with pytest.raises(InvalidRequest, match=r"tokens\.0"):
            parse(content, DetokenizeRequest)
    during = len(seen)
    done.set()
    looking.join()
    assert during >= 5


@pytest.mark.parametrize(
    ("content", "words"),
    [
        (b'{"prompt": "x", "seed": 1, "seed": 2}', None),
        (b'{"prompt": "x", "temperature": NaN}', "temperature is NaN"),
        (b'{"prompt": "' + b"x" * SMALL + b'", "temperature": NaN}', "temperature is NaN"),
        (b'{"prompt": "' + b"x" * SMALL + b'", "seed": ' + b"9" * 5000 + b"}", "digits"),
    ],
)
def test_a_large_body_is_read_as_a_small_one_is(content: bytes, words: str | None) -> None:
    if words is None:
        assert parse(content, CompletionRequest).seed == 2  # the last one counts, as everywhere
        return
    with pytest.raises(InvalidRequest, match=words):
        parse(content, CompletionRequest)


async def test_only_small_work_is_done_in_the_event_loops_thread() -> None:
    heavy, here = Heavy(), threading.get_ident()
    threads = [
        await heavy.run(size, threading.get_ident) for size in (1, SMALL, SMALL + 1, LARGE, LARGE + 1, 10 * LARGE)
    ]
    assert [t == here for t in threads] == [True, True, False, False, False, False]
    assert threads[4] == threads[5]


async def test_what_work_raises_comes_through_from_everywhere() -> None:
    def fail(message: str, **more: Any) -> None:
        raise InvalidRequest(message, **more)

    for size in (1, SMALL + 1, LARGE + 1):
        with pytest.raises(InvalidRequest, match="no good") as caught:
            await Heavy().run(size, fail, "no good", param="p")
        assert caught.value.param == "p"


def test_an_empty_list_is_refused_in_plain_words() -> None:
    """pydantic says "List should have at least 1 item after validation, not 0"."""
    with pytest.raises(InvalidRequest) as caught:
        parse(b'{"messages": []}', ChatRequest)
    assert caught.value.message == "messages: List should have at least 1 item (got [])"
