"""HTTP byte by byte, for tests."""

from __future__ import annotations

import contextlib
import json
import socket
import time
from collections.abc import Callable, Iterator

import httpx

from tests.api.conftest import Running

TEXT, CHAT = "/v1/completions", "/v1/chat/completions"
BODY = {"prompt": "ab", "max_tokens": 3, "temperature": 0}
Start = Callable[..., Running]


@contextlib.contextmanager
def connected(server: Running, timeout_s: float = 10.0) -> Iterator[socket.socket]:
    url = httpx.URL(server.url)
    with socket.create_connection((url.host, url.port or 80), timeout=timeout_s) as connection:
        yield connection


def everything(connection: socket.socket) -> bytes:
    """What comes until the server closes the connection."""
    received = b""
    with contextlib.suppress(ConnectionResetError):
        while piece := connection.recv(65_536):
            received += piece
    return received


def request(body: object = BODY, *headers: str, version: str = "1.1", path: str = TEXT) -> bytes:
    content = json.dumps(body).encode()
    lines = [f"POST {path} HTTP/{version}", "Host: x", f"Content-Length: {len(content)}", *headers]
    return "\r\n".join([*lines, "", ""]).encode() + content


def exchange(server: Running, *sent: bytes, half_close: bool = False) -> tuple[bytes, bytes]:
    """Send the pieces, and split what comes into head and body of the reply."""
    with connected(server) as connection:
        for piece in sent:
            connection.sendall(piece)
            time.sleep(0.02 if len(sent) > 1 else 0)
        if half_close:
            connection.shutdown(socket.SHUT_WR)
        head, _, body = everything(connection).partition(b"\r\n\r\n")
    return head, body


def closed_while_sending(connection: socket.socket, piece: bytes) -> bool:
    """Whether the server ends a connection on which a piece comes every tenth of a second."""
    with contextlib.suppress(ConnectionError):
        for _ in range(150):
            connection.sendall(piece)
            time.sleep(0.1)
        return False
    return True


def error_of(body: bytes) -> dict[str, object]:
    error: dict[str, object] = json.loads(body)["error"]
    return error
