"""A process that renders chat templates, one request after another, until its stdin ends.

Request on stdin: length (8 bytes) and the marshalled triple (template source, variables, messages, each of them
marshalled). Reply on stdout: a Status and a length (1 + 8 bytes), then text in UTF-8. Marshal moves plain data only and
takes whatever JSON and Python strings can hold (integers of any size, lone surrogates).
"""

from __future__ import annotations

import functools
import marshal
import os
import resource
import signal
import struct
import sys
from enum import IntEnum
from typing import Any, BinaryIO

import jinja2

from nexusengine.templates.environment import make_environment

REQUEST, REPLY = struct.Struct("<Q"), struct.Struct("<BQ")
MEMORY_LIMIT_BYTES = 512 * 2**20
"""Address space of the process. It needs about 40 MiB for itself; a text with one emoji takes 4 bytes a character, and
a template makes several copies of it."""
OUTPUT_LIMIT = 16 * 2**20
"""Characters that a template may write: twice the largest body that the server reads by default."""
_REASON_LENGTH = 400
_NICE = 10
"""A template that loops takes no processor time that the server or a worker wants."""


class Status(IntEnum):
    """How a rendering ended. The reply's text is the prompt, the template's refusal, or empty where a limit was met."""

    RENDERED = 0
    REFUSED = 1
    TOO_MUCH_MEMORY = 2
    TOO_LONG = 3


class _TooLong(Exception):
    pass


@functools.lru_cache(maxsize=16)
def _compiled(source: str) -> jinja2.Template:
    return make_environment().from_string(source)


def render(source: str, variables: dict[str, Any], messages: list[bytes]) -> str:
    """Render messages (each marshalled) with a template's source.

    Raises whatever the template makes Python raise, and _TooLong beyond OUTPUT_LIMIT characters.
    """
    pieces, left = [], OUTPUT_LIMIT
    for piece in _compiled(source).generate({**variables, "messages": [marshal.loads(m) for m in messages]}):
        pieces.append(piece)
        left -= len(piece)
        if left < 0:
            raise _TooLong
    return "".join(pieces)


def reply_to(payload: bytes) -> tuple[Status, bytes]:
    """Render the request in `payload`; its status and text in UTF-8. Raises nothing that a template causes."""
    try:
        return Status.RENDERED, _encoded(render(*marshal.loads(payload)))
    except MemoryError:
        return Status.TOO_MUCH_MEMORY, b""
    except _TooLong:
        return Status.TOO_LONG, b""
    except Exception as error:  # a template can raise anything
        reason = " ".join(str(error).split())
        return Status.REFUSED, _encoded((reason or type(error).__name__)[:_REASON_LENGTH])


def _encoded(text: str) -> bytes:
    return text.encode("utf-8", "surrogatepass")


def serve(requests: BinaryIO, replies: BinaryIO, cpu_limit_s: float) -> None:
    """Render until stdin ends.

    Args:
        cpu_limit_s: processor time that a request may take; the kernel then ends this process with SIGPROF, whatever it
            is doing and whether its parent still lives.
    """
    while len(head := requests.read(REQUEST.size)) == REQUEST.size:
        payload = requests.read(*REQUEST.unpack(head))
        signal.setitimer(signal.ITIMER_PROF, cpu_limit_s)
        status, content = reply_to(payload)
        signal.setitimer(signal.ITIMER_PROF, 0)
        replies.write(REPLY.pack(status, len(content)))
        replies.write(content)
        replies.flush()


def main() -> None:
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    os.nice(_NICE)
    for kind, limit in (
        (resource.RLIMIT_AS, MEMORY_LIMIT_BYTES),
        (resource.RLIMIT_CORE, 0),
        (resource.RLIMIT_FSIZE, 0),
    ):
        _, hard = resource.getrlimit(kind)
        if hard == resource.RLIM_INFINITY or limit < hard:
            resource.setrlimit(kind, (limit, limit))
    requests, replies = sys.stdin.buffer, os.fdopen(os.dup(1), "wb")
    os.dup2(os.open(os.devnull, os.O_WRONLY), 1)  # nothing but replies goes to the parent
    serve(requests, replies, cpu_limit_s=float(sys.argv[1]))


if __name__ == "__main__":
    main()
