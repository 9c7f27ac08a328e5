"""HTTP on one connection: uvicorn's protocol with limits for headers, HTTP/1.0 and clients that close one side."""

from __future__ import annotations

import asyncio
import os
import socket
import sys
from collections.abc import Callable
from typing import Any

import httptools
from uvicorn.protocols.http.httptools_impl import STATUS_LINE, HttpToolsProtocol

from nexusengine.errors import HeadersTimeout, HeadersTooLarge, InvalidRequest, NexusError
from nexusengine.obs.logs import get_logger
from nexusengine.server.errors import error_response

MAX_HEADER_BYTES = 65_536
DEFAULT_HEADER_TIMEOUT_S = 30.0
_LINGER_S = 5.0
_PRESENCE_EVERY_S = 1.0
_CONTINUE = b"HTTP/1.1 100 Continue\r\n\r\n"
_TCP_CLOSE = 7
_FRAMING = (b"content-length", b"transfer-encoding")
log = get_logger("server")


def http_protocol(header_timeout_s: float) -> type[BoundedProtocol]:
    """The protocol class with this limit, for uvicorn, which makes its instances itself."""
    return type("HTTP", (BoundedProtocol,), {"header_timeout_s": header_timeout_s})


class BoundedProtocol(HttpToolsProtocol):
    """uvicorn's protocol, with bounds on what a connection may do.

    A request line with headers beyond MAX_HEADER_BYTES is refused (431), before an API key is looked at. Headers that
    do not arrive within header_timeout_s end the connection (408 if some did). So does a body that goes on for 5 s
    after its request was answered. A client that closes its sending side gets its answer. Streams to HTTP/1.0 clients
    are not chunked. Upgrades are declined by serving the request as it stands.
    """

    header_timeout_s = DEFAULT_HEADER_TIMEOUT_S

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        super().connection_made(transport)
        self._in_headers, self._header_bytes = True, 0
        self._receiving = self._refused = self._repeating = False
        self._thrown_away = 0
        self._framing = b""  # headers that tell the length of a body which the parser is not going to read
        self._timer: asyncio.TimerHandle | None = None
        self._set_timer(self.header_timeout_s, self._headers_are_late)

    def connection_lost(self, exc: Exception | None) -> None:
        self._clear_timer()
        super().connection_lost(exc)

    def data_received(self, data: bytes) -> None:
        self._unset_keepalive_if_required()
        if self._refused or self.transport.is_closing():
            self._thrown_away += len(data)
            if self._thrown_away > MAX_HEADER_BYTES:
                self.flow.pause_reading()
            return
        if not self._receiving and not self._in_headers:  # the first bytes of a further request
            self._in_headers, self._header_bytes = True, 0
            self._set_timer(self.header_timeout_s, self._headers_are_late)
        counted = self._in_headers
        try:
            self._feed(data)
        except httptools.HttpParserError as error:
            cause = error.__context__
            self._refuse(cause if isinstance(cause, NexusError) else InvalidRequest("this is not valid HTTP"))
            return
        if counted and self._in_headers:
            self._header_bytes += len(data)
            if self._header_bytes > MAX_HEADER_BYTES:
                self._refuse(_too_large())

    def _feed(self, data: bytes) -> None:
        """Raises HttpParserError."""
        try:
            self.parser.feed_data(data)
        except httptools.HttpParserUpgrade as upgrade:  # the parser has stopped behind the headers
            rest = data[upgrade.args[0] :]
            self.parser = httptools.HttpRequestParser(self)
            if self._framing:
                self._repeating = True
                self.parser.feed_data(b"POST / HTTP/1.1\r\n" + self._framing + b"\r\n\r\n")
                self._repeating, self._framing = False, b""
            if rest:
                self._feed(rest)

    def on_message_begin(self) -> None:
        if not self._repeating:
            super().on_message_begin()
            self._receiving = True

    def on_url(self, url: bytes) -> None:
        if not self._repeating:
            super().on_url(url)

    def on_header(self, name: bytes, value: bytes) -> None:
        if not self._repeating:
            super().on_header(name, value)

    def on_headers_complete(self) -> None:
        if self._repeating:
            return
        size = len(self.url) + sum(len(name) + len(value) + 4 for name, value in self.headers)
        if size > MAX_HEADER_BYTES:
            raise _too_large()
        self._in_headers = False
        self._clear_timer()
        if self.parser.should_upgrade():
            lengths = (name + b": " + value for name, value in self.headers if name in _FRAMING and value != b"0")
            self._framing = b"\r\n".join(lengths)
        super().on_headers_complete()
        if self.scope["http_version"] == "1.0":
            self.cycle.send = _unframed(self.cycle)  # type: ignore[method-assign]

    def on_message_complete(self) -> None:
        if self._framing:  # of a request to upgrade, which ends for the parser where its body begins
            return
        self._receiving = False
        if self.cycle is not None and self.cycle.response_complete:  # from here on the connection is idle
            self._set_timer(self.header_timeout_s, self._headers_are_late)
        super().on_message_complete()

    def on_response_complete(self) -> None:
        super().on_response_complete()
        if self._receiving and not self._in_headers and not self.transport.is_closing():
            self._set_timer(_LINGER_S, self.transport.close)

    def send_400_response(self, msg: str) -> None:
        self._refuse(InvalidRequest(msg))

    def eof_received(self) -> bool:  # type: ignore[override]
        """True keeps the side open on which the answer goes out."""
        complete = self.cycle is not None and not self.cycle.more_body and not self._in_headers
        if self._refused or not complete or self.cycle.response_complete:
            return False
        connection = self.transport.get_extra_info("socket")
        if _tcp_state(connection) is None:  # no way to see later whether the client is there
            return False
        self.cycle.keep_alive = False
        self._set_timer(_PRESENCE_EVERY_S, lambda: self._look_for_client(connection, 0))
        return True

    def _look_for_client(self, connection: Any, looks: int) -> None:
        """Send an interim reply, which is allowed at any time before the reply begins, to learn of a closed connection.

        A client that closed both sides looks like one that closed one until it is sent something: its system then
        resets the connection.
        """
        if self.transport.is_closing():
            return
        if _tcp_state(connection) in (None, _TCP_CLOSE):
            self.transport.abort()
            return
        started = self.cycle.response_started or self.cycle.scope["http_version"] == "1.0"
        if looks % 10 == 0 and not started:
            self.transport.write(_CONTINUE)
        pause_s = _PRESENCE_EVERY_S if looks else _PRESENCE_EVERY_S / 4
        self._set_timer(pause_s, lambda: self._look_for_client(connection, looks + 1))

    def _headers_are_late(self) -> None:
        if self.cycle is not None and not self.cycle.response_complete:  # an answer is not cut off by what follows it
            self._set_timer(self.header_timeout_s, self._headers_are_late)
        elif self._receiving:
            self._refuse(HeadersTimeout(f"the headers did not arrive within {self.header_timeout_s:g} s"))
        else:
            self.transport.close()

    def _refuse(self, error: NexusError) -> None:
        """Answer what has not become a request, and close; if an earlier one is being answered, close after that."""
        if self.transport.is_closing():
            return
        self._refused = True
        if self.cycle is not None and not self.cycle.response_complete:
            self.cycle.keep_alive = False
            if self.cycle.more_body:  # its own body is broken, and so is what is behind it
                self.transport.close()
            return
        log.debug("a request from %s was refused: %s", self.client, error.message)
        reply = error_response(error, {"connection": "close"})
        head = b"".join(name + b": " + value + b"\r\n" for name, value in reply.raw_headers)
        self.transport.write(STATUS_LINE[error.http_status] + head + b"\r\n" + bytes(reply.body))
        # What is still coming is thrown away for a moment: to close on it would reset the connection, reply and all.
        self._set_timer(_LINGER_S, self.transport.close)
        if self.transport.can_write_eof():
            self.transport.write_eof()

    def _set_timer(self, seconds: float, act: Callable[[], Any]) -> None:
        self._clear_timer()
        self._timer = self.loop.call_later(seconds, act)

    def _clear_timer(self) -> None:
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None


def _too_large() -> HeadersTooLarge:
    return HeadersTooLarge(f"the request line and headers are larger than {MAX_HEADER_BYTES} bytes")


def _unframed(cycle: Any) -> Any:
    """`cycle.send` for HTTP/1.0, which knows no chunks: a reply of unknown length ends where the connection ends."""
    framed, of_unknown_length = cycle.send, False

    async def send(message: Any) -> None:
        nonlocal of_unknown_length
        if message["type"] == "http.response.start":
            of_unknown_length = all(name.lower() != b"content-length" for name, _ in message["headers"])
            cycle.chunked_encoding = False if of_unknown_length else None
        elif of_unknown_length:
            cycle.expected_content_length = len(message.get("body", b""))
        await framed(message)

    return send


def _tcp_state(connection: Any) -> int | None:
    """The state of a TCP connection as Linux numbers them; None elsewhere and for what is no TCP connection.

    connection: a transport's socket; uvloop's has a descriptor and hardly more.
    """
    if sys.platform != "linux" or connection is None:
        return None
    try:
        with socket.socket(fileno=os.dup(connection.fileno())) as own:
            return own.getsockopt(socket.IPPROTO_TCP, socket.TCP_INFO, 1)[0]
    except OSError:
        return None
