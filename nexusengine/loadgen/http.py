"""A connection for streamed completions: HTTP by httptools, events taken apart by hand.

Several hundred streams share one core with the server, so an event that only carries text is counted and timed, never
parsed.
"""

from __future__ import annotations

import asyncio
import json
import re
import time
from typing import Any
from urllib.parse import urlsplit

import httptools

from nexusengine.errors import ConfigError
from nexusengine.loadgen.record import Record

_ONLY_TEXT = re.compile(rb'"finish_reason": ?null')
_MOST_ERROR_BYTES = 65_536


class Target:
    """Where requests go. Raises ConfigError for what is not an HTTP URL."""

    def __init__(self, url: str, api_key: str | None = None, path: str = "/v1/completions") -> None:
        parts = urlsplit(url)
        if parts.scheme != "http" or not parts.hostname:
            raise ConfigError(f"--url must be of the form http://HOST:PORT, got {url!r}", param="url")
        self.url, self.host, self.port = url.rstrip("/"), parts.hostname, parts.port or 80
        self.api_key = api_key
        head = [
            f"POST {parts.path.rstrip('/')}{path} HTTP/1.1",
            f"Host: {parts.netloc}",
            "Content-Type: application/json",
            "x-nexus-verdict: 1",
        ]
        if api_key is not None:
            head.append(f"Authorization: Bearer {api_key}")
        self._head = "\r\n".join(head).encode()

    def request(self, body: bytes) -> bytes:
        return b"%b\r\nContent-Length: %d\r\n\r\n%b" % (self._head, len(body), body)


class Connection(asyncio.Protocol):
    """One request at a time; `closed` once it is of no more use. Fills the record of the request as news come."""

    def __init__(self) -> None:
        self.closed = False
        self._transport: asyncio.Transport | None = None
        self._record: Record | None = None
        self._done: asyncio.Future[None] | None = None

    async def exchange(self, request: bytes, record: Record) -> None:
        """Send and wait until the reply is complete. Raises ConnectionError if the connection breaks before."""
        if self._transport is None or self.closed:
            raise ConnectionError("the connection is closed")
        self._record, self._done = record, asyncio.get_running_loop().create_future()
        self._parser = httptools.HttpResponseParser(self)
        self._rest, self._error, self._complete = b"", bytearray(), False
        self._transport.write(request)
        try:
            await self._done
        except BaseException:
            self.close()
            raise
        finally:
            self._record = self._done = None

    def close(self) -> None:
        """At once; an exchange under way raises."""
        self.closed = True
        if self._transport is not None:
            self._transport.abort()

    # ---- asyncio -------------------------------------------------------------------------------------------------

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self._transport = transport  # type: ignore[assignment]

    def data_received(self, data: bytes) -> None:
        if self._record is None:
            self.close()  # nothing was asked for
            return
        self._now_s = time.monotonic()
        try:
            self._parser.feed_data(data)
        except (httptools.HttpParserError, ValueError) as error:
            self._record.error = "not_http"
            self._end(ConnectionError(f"the reply is broken: {error}"))

    def connection_lost(self, error: Exception | None) -> None:
        self.closed = True
        self._end(ConnectionError("the connection was closed" if error is None else str(error)))

    def _end(self, error: Exception | None) -> None:
        if self._done is None or self._done.done():
            return
        if error is None:
            self._done.set_result(None)
        else:
            self._done.set_exception(error)

    # ---- httptools -----------------------------------------------------------------------------------------------

    def on_headers_complete(self) -> None:
        if self._record is not None:
            self._record.status = self._parser.get_status_code()

    def on_body(self, body: bytes) -> None:
        record = self._record
        if record is None:
            return
        if record.status != 200:
            self._error += body[: _MOST_ERROR_BYTES - len(self._error)]
            return
        *events, self._rest = (self._rest + body).split(b"\n\n")
        for event in events:
            if _ONLY_TEXT.search(event):
                self._tokens(record)
            elif event == b"data: [DONE]":
                self._complete = True
            elif event.startswith(b"data: "):
                self._look_into(record, json.loads(event[6:]))

    def on_message_complete(self) -> None:
        record = self._record
        if record is None:
            return
        record.ended_s = self._now_s
        if record.status != 200:
            record.error = _error_kind(record.status, bytes(self._error))
        elif record.error is None and not self._complete:
            record.error = "incomplete"
        if not self._parser.should_keep_alive():
            self.closed = True
        self._end(None)

    def _tokens(self, record: Record) -> None:
        if record.events == 0:
            record.first_s = self._now_s
        record.last_s = self._now_s
        slo = record.item.slo
        if slo is not None and self._now_s > record.intended_s + slo.ttft_s + record.events * slo.tpot_s:
            record.in_time = False
        record.events += 1

    def _look_into(self, record: Record, event: dict[str, Any]) -> None:
        if "error" in event:
            record.error = f"stream_{event['error'].get('code') or 'error'}"
        if event.get("choices"):
            self._tokens(record)
        if event.get("usage"):
            record.output_tokens = event["usage"]["completion_tokens"]
        record.nexus = event.get("nexus") or record.nexus


def _error_kind(status: int, body: bytes) -> str:
    try:
        code = json.loads(body)["error"]["code"]
    except (ValueError, KeyError, TypeError):
        code = None
    return f"http_{status}" + (f"_{code}" if code else "")
