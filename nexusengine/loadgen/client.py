"""The open loop: every request at its time, on connections that are used again."""

from __future__ import annotations

import asyncio
import math
import resource
import time
from collections.abc import Callable, Sequence

from nexusengine.loadgen.http import Connection, Target
from nexusengine.loadgen.items import WorkItem
from nexusengine.loadgen.record import Record

_START_AFTER_S = 0.2


async def run_open_loop(
    target: Target,
    items: Sequence[WorkItem],
    bodies: Sequence[bytes],
    *,
    timeout_s: float = 600.0,
    progress: Callable[[Record], None] = lambda record: None,
) -> list[Record]:
    """Send each item at its time and wait for all answers; the records in the order of the items.

    timeout_s: an answer that is not complete so long after it was to be sent is given up. progress: called with each
    record that has ended.
    """
    _allow_many_connections()
    client = _Client(target, timeout_s, progress)
    began_s = time.monotonic() + _START_AFTER_S
    records = [Record(item, began_s + item.send_at_s) for item in items]
    tasks: list[asyncio.Task[None]] = []
    try:
        for i in sorted(range(len(items)), key=lambda i: items[i].send_at_s):
            wait_s = records[i].intended_s - time.monotonic()
            if wait_s > 0:
                await asyncio.sleep(wait_s)
            tasks.append(asyncio.create_task(client.send(bodies[i], records[i])))
        await asyncio.gather(*tasks)
    finally:
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
        client.close()
    return records


class _Client:
    def __init__(self, target: Target, timeout_s: float, progress: Callable[[Record], None]) -> None:
        self._target, self._timeout_s, self._progress = target, timeout_s, progress
        self._idle: list[Connection] = []

    async def send(self, body: bytes, record: Record) -> None:
        """Never raises but when it is cancelled; what went wrong is in the record."""
        try:
            async with asyncio.timeout(record.intended_s + self._timeout_s - time.monotonic()):
                await self._exchange(self._target.request(body), record)
        except TimeoutError:
            record.error = "timeout"
        except OSError as error:  # ConnectionError is one
            record.error = record.error or ("broken_off" if record.status else _kind(error))
        if math.isnan(record.ended_s):
            record.ended_s = time.monotonic()
        self._progress(record)

    async def _exchange(self, request: bytes, record: Record) -> None:
        """Send a request on a connection that is free, else on a new one.

        A free one that the server has closed meanwhile, without a word on this request, is replaced by a new one.
        """
        record.sent_s = time.monotonic()
        while self._idle:
            connection = self._idle.pop()
            if connection.closed:
                continue
            try:
                await connection.exchange(request, record)
            except ConnectionError:
                if record.status or record.error:
                    raise
                continue
            self._keep(connection)
            return
        loop = asyncio.get_running_loop()
        _, connection = await loop.create_connection(Connection, self._target.host, self._target.port)
        try:
            await connection.exchange(request, record)
        except BaseException:
            connection.close()
            raise
        self._keep(connection)

    def _keep(self, connection: Connection) -> None:
        if connection.closed:
            connection.close()
        else:
            self._idle.append(connection)

    def close(self) -> None:
        for connection in self._idle:
            connection.close()


def _kind(error: OSError) -> str:
    return "refused_connection" if isinstance(error, ConnectionRefusedError) else "connection"


def _allow_many_connections() -> None:
    """As many open files as this user may have."""
    _, most = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (most, most))
