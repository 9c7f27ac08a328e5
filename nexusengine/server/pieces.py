"""Long work on the event loop, and long replies, in pieces short enough for everybody else."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Iterable, Mapping, Sequence

from starlette.responses import Response
from starlette.types import Receive, Scope, Send

_PIECE_S = 0.005
_PIECE_BYTES = 2**18


class LoopYield:
    """Gives the event loop back every few milliseconds, between any two short steps of long work.

    An `async for` over what is there already never does so by itself.
    """

    def __init__(self) -> None:
        self._since_s = time.monotonic()

    async def yield_if_due(self) -> None:
        if time.monotonic() - self._since_s > _PIECE_S:
            await asyncio.sleep(0)
            self._since_s = time.monotonic()


class JSONPieces(Response):
    """A JSON reply that is never put together: its pieces are sent one by one, as the client takes them."""

    media_type = "application/json"

    def __init__(self, pieces: Sequence[bytes], headers: Mapping[str, str] | None = None) -> None:
        self.status_code, self.background, self.body = 200, None, b""
        self._pieces = pieces
        self.init_headers({**(headers or {}), "content-length": str(sum(map(len, pieces)))})

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        await send({"type": "http.response.start", "status": self.status_code, "headers": self.raw_headers})
        loop_yield = LoopYield()
        for piece in _parts(self._pieces):
            await send({"type": "http.response.body", "body": piece, "more_body": True})
            await loop_yield.yield_if_due()
        await send({"type": "http.response.body", "body": b""})


def _parts(pieces: Iterable[bytes]) -> Iterable[bytes]:
    """The same bytes in parts of a size that a socket takes at a time: small pieces joined, large ones cut."""
    small = bytearray()
    for piece in pieces:
        if len(piece) < _PIECE_BYTES:
            small += piece
            if len(small) < _PIECE_BYTES:
                continue
            piece = b""
        if small:
            yield bytes(small)
            small.clear()
        for begin in range(0, len(piece), _PIECE_BYTES):
            yield piece[begin : begin + _PIECE_BYTES]
    yield bytes(small)
