"""Reading a request's body: bounded, strictly JSON, checked against its schema; every refusal names its cause."""

from __future__ import annotations

import asyncio
import json
import reprlib
from typing import Any, NoReturn, TypeVar

from pydantic import ValidationError
from starlette.requests import Request

from nexusengine.config import ServeConfig
from nexusengine.errors import Cancelled, DeadlineExceeded, InvalidRequest, PayloadTooLarge
from nexusengine.server.schemas import Body

B = TypeVar("B", bound=Body)


async def read_body(request: Request, schema: type[B]) -> B:
    """Raises PayloadTooLarge, InvalidRequest naming the field, DeadlineExceeded, or Cancelled if the client left."""
    config: ServeConfig = request.app.state.server.config
    try:
        async with asyncio.timeout(config.request_timeout):
            content = await _content(request, config.max_body_bytes)
    except TimeoutError:
        raise DeadlineExceeded(f"the body did not arrive within {config.request_timeout} s") from None
    return parse(content, schema)


async def _content(request: Request, limit_bytes: int) -> bytes:
    declared = request.headers.get("content-length", "")
    if declared.isdigit() and int(declared) > limit_bytes:
        _too_large(int(declared), limit_bytes)
    content = bytearray()
    while True:
        message = await request.receive()
        if message["type"] == "http.disconnect":
            raise Cancelled("the client left before its request was complete")
        content += message.get("body", b"")
        if len(content) > limit_bytes:
            _too_large(len(content), limit_bytes)
        if not message.get("more_body", False):
            return bytes(content)


def parse(content: bytes, schema: type[B]) -> B:
    constants: list[_NotJSON] = []

    def keep(name: str) -> _NotJSON:
        constants.append(_NotJSON(name))
        return constants[-1]

    try:
        value = json.loads(content.decode(), parse_constant=keep)
    except UnicodeDecodeError as error:
        raise InvalidRequest(f"the body is not valid UTF-8 at byte {error.start}") from None
    except json.JSONDecodeError as error:
        raise InvalidRequest(f"the body is not valid JSON: {error.msg} (character {error.pos})") from None
    except ValueError:  # Python's own limit against numbers that take long to read
        raise InvalidRequest("the body holds a number with too many digits") from None
    except RecursionError:
        raise InvalidRequest("the body is nested too deeply") from None
    if constants:
        path = _path_of_constant(value)
        raise InvalidRequest(f"{path or 'the body'} is {constants[0]}, which is not a JSON value", param=path or None)
    if not isinstance(value, dict):
        raise InvalidRequest("the body must be a JSON object")
    try:
        body = schema.model_validate(value)
    except ValidationError as error:
        raise _named(error) from None
    body.check_refused()
    return body


def _too_large(size: int, limit: int) -> NoReturn:
    raise PayloadTooLarge(f"the body has {size} bytes or more; at most {limit} are read (--max-body-bytes)")


class _NotJSON(str):
    """NaN, Infinity or -Infinity, which Python would read and JSON does not know."""

    __slots__ = ()


def _path_of_constant(value: Any) -> str:
    """Where the first of them stands: "temperature", "stop.2"."""
    stack = [("", value)]
    while stack:
        path, item = stack.pop()
        if isinstance(item, _NotJSON):
            return path
        inside = item.items() if isinstance(item, dict) else enumerate(item) if isinstance(item, list) else ()
        stack.extend((f"{path}.{key}".lstrip("."), part) for key, part in reversed(list(inside)))
    return ""


def _named(error: ValidationError) -> InvalidRequest:
    """The first fault, with the path of its field; of a union's many complaints the one that got furthest."""
    faults = error.errors(include_url=False, include_context=False)
    fault = max(faults, key=lambda f: len(f["loc"]))
    path = ".".join(str(part) for part in fault["loc"] if not _is_type_name(part))
    shown = "" if fault["type"] == "missing" else f" (got {reprlib.repr(fault['input'])})"
    return InvalidRequest(f"{path or 'the body'}: {fault['msg']}{shown}", param=path or None)


def _is_type_name(part: str | int) -> bool:
    """pydantic puts the names of a union's branches into the path: list[int], str, ..."""
    return isinstance(part, str) and (part in ("str", "int") or part.endswith("]"))
