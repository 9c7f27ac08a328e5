"""Reading a request's body: bounded, strictly JSON, checked against its schema; every refusal names its cause."""

from __future__ import annotations

import asyncio
import json
import reprlib
from collections.abc import Iterator
from typing import Any, NoReturn, TypeVar

from pydantic import ValidationError
from starlette.requests import Request

from nexusengine.errors import (
    Cancelled,
    DeadlineExceeded,
    InvalidRequest,
    Overloaded,
    PayloadTooLarge,
    UnsupportedMediaType,
)
from nexusengine.server.heavy import SMALL
from nexusengine.server.json_size import check_structure
from nexusengine.server.media import check_media, is_curls_default
from nexusengine.server.schemas import Body
from nexusengine.server.state import ServerState

B = TypeVar("B", bound=Body)
_FREE_BYTES = 65_536
_RETRY_WHEN_FULL_S = 1.0


async def read_body(request: Request, schema: type[B]) -> B:
    """The body, checked; a long one is parsed in a thread.

    Raises UnsupportedMediaType, PayloadTooLarge, InvalidRequest naming the field, Overloaded while other bodies take
    all the memory there is for them, DeadlineExceeded, or Cancelled if the client left.
    """
    state: ServerState = request.app.state.server
    check_media(request.headers)
    content = bytearray()
    try:
        async with asyncio.timeout(state.config.request_timeout):
            await _receive(request, content, state)
        if is_curls_default(request.headers) and not content.lstrip().startswith((b"{", b"[")):
            raise UnsupportedMediaType("the body is a form; send JSON, as 'Content-Type: application/json'")
        return await state.heavy.run(len(content), parse, bytes(content), schema)
    except TimeoutError:
        raise DeadlineExceeded(f"the body did not arrive within {state.config.request_timeout} s") from None
    finally:
        state.body_bytes -= len(content)


async def _receive(request: Request, content: bytearray, state: ServerState) -> None:
    """Append the body to `content`, counting in state.body_bytes what is there."""
    limit_bytes, limit_of_all = state.config.max_body_bytes, state.config.max_buffered_bytes
    declared = request.headers.get("content-length", "")
    if declared.isdigit() and int(declared) > limit_bytes:
        _too_large(int(declared), limit_bytes)
    while True:
        message = await request.receive()
        if message["type"] == "http.disconnect":
            raise Cancelled("the client left before its request was complete")
        piece = message.get("body", b"")
        content += piece
        state.body_bytes += len(piece)
        if len(content) > limit_bytes:
            _too_large(len(content), limit_bytes)
        if len(content) > _FREE_BYTES and state.body_bytes > limit_of_all:
            raise Overloaded(
                f"the bodies of the requests in progress take {limit_of_all} bytes (--max-buffered-bytes)",
                retry_after_s=_RETRY_WHEN_FULL_S,
            )
        if not message.get("more_body", False):
            return


def parse(content: bytes, schema: type[B]) -> B:
    """Raises InvalidRequest naming the field."""
    constant: _NotJSON | None = None

    def keep(name: str) -> _NotJSON:
        nonlocal constant
        constant = constant or _NotJSON(name)
        return constant

    try:
        check_structure(content)
        # A function called for each number lets other threads run in between; in C alone, 4 million would hold them up.
        small = len(content) <= SMALL
        value = json.loads(
            content.decode(),
            parse_constant=keep,
            parse_int=int if small else _int,
            parse_float=float if small else _float,
        )
    except UnicodeDecodeError as error:
        raise InvalidRequest(f"the body is not valid UTF-8 at byte {error.start}") from None
    except json.JSONDecodeError as error:
        raise InvalidRequest(f"the body is not valid JSON: {error.msg} (character {error.pos})") from None
    except InvalidRequest:
        raise
    except ValueError:  # Python's own limit against numbers that take long to read
        raise InvalidRequest("the body holds a number with too many digits") from None
    except RecursionError:
        raise InvalidRequest("the body is nested too deeply") from None
    if constant is not None:
        path = _path_of_constant(value)
        raise InvalidRequest(f"{path or 'the body'} is {constant}, which is not a JSON value", param=path or None)
    if not isinstance(value, dict):
        raise InvalidRequest("the body must be a JSON object")
    try:
        body = schema.model_validate(value)
    except ValidationError as error:
        raise _named(error) from None
    body.check_unsupported()
    return body


def _int(digits: str) -> int:
    return int(digits)


def _float(digits: str) -> float:
    return float(digits)


def _too_large(size: int, limit: int) -> NoReturn:
    raise PayloadTooLarge(f"the body has {size} bytes or more; at most {limit} are read (--max-body-bytes)")


class _NotJSON(str):
    """NaN, Infinity or -Infinity, which Python would read and JSON does not know."""

    __slots__ = ()


def _path_of_constant(value: Any) -> str:
    """Where the first of them stands: "temperature", "stop.2"."""
    if isinstance(value, _NotJSON):
        return ""
    inside = [("", _items(value))]  # from the outside in, each with what was not looked at yet
    while inside:
        path, items = inside[-1]
        for key, item in items:
            if isinstance(item, _NotJSON):
                return f"{path}{key}"
            if isinstance(item, dict | list):
                inside.append((f"{path}{key}.", _items(item)))
                break
        else:
            inside.pop()
    return ""


def _items(value: Any) -> Iterator[tuple[Any, Any]]:
    return iter(value.items() if isinstance(value, dict) else enumerate(value))


def _named(error: ValidationError) -> InvalidRequest:
    """The first fault, with the path of its field; of a union's many complaints the one that got furthest."""
    faults = error.errors(include_url=False, include_context=False)
    fault = max(faults, key=lambda f: len(f["loc"]))
    path = ".".join(str(part) for part in fault["loc"] if not _is_type_name(part))
    shown = "" if fault["type"] == "missing" else f" (got {reprlib.repr(fault['input'])})"
    what = fault["msg"].partition(" after validation")[0]  # "List should have at least 1 item after validation, not 0"
    return InvalidRequest(f"{path or 'the body'}: {what}{shown}", param=path or None)


def _is_type_name(part: str | int) -> bool:
    """pydantic puts the names of a union's branches into the path: list[int], str, ..."""
    return isinstance(part, str) and (part in ("str", "int") or part.endswith("]"))
