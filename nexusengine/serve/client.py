"""The router's client: what the HTTP server and multi-device engines submit requests through."""

from __future__ import annotations

import asyncio
import contextlib
import time
import weakref

import zmq

from nexusengine import wire
from nexusengine.backend import Sink
from nexusengine.errors import Unavailable, WorkerLost
from nexusengine.types import EngineRequest, TokenDelta

_HELLO_EVERY_S = 1.0
_SILENT_S, _GONE_S = 5.0, 30.0
_ANSWER_S = 3.0
_HIGH_WATER = 100_000
_MOST_FRAMES_A_TURN = 256


class _Pending:
    """A request that has no final delta yet."""

    __slots__ = ("sink", "streamed")

    def __init__(self, sink: Sink) -> None:
        self.sink, self.streamed = sink, False


def _drop(socket: zmq.Socket[bytes], context: zmq.Context[zmq.Socket[bytes]]) -> None:
    """Of a client that nobody closed: a context that is garbage waits for its sockets, which is for ever."""
    socket.close(linger=0)
    context.term()


class RouterClient:
    """AsyncBackend over a DEALER socket; lives in one event loop, which watches the socket's file descriptor: a future
    for every message would cost a tenth of a millisecond each."""

    def __init__(self, endpoint: str) -> None:
        self._endpoint = endpoint
        self._pending: dict[str, _Pending] = {}
        self._cluster: wire.Cluster | None = None
        self._heard_s = 0.0
        self._tasks: list[asyncio.Task[None]] = []
        self._changed = asyncio.Event()
        self._queries: dict[int, asyncio.Queue[wire.Findings]] = {}
        self._next_query = 0

    async def start(self) -> None:
        self._heard_s = time.monotonic()
        self._loop = asyncio.get_running_loop()
        self._context = zmq.Context()
        self._socket: zmq.Socket[bytes] = self._context.socket(zmq.DEALER)
        self._socket.set(zmq.SNDHWM, _HIGH_WATER)
        self._socket.set(zmq.RCVHWM, _HIGH_WATER)
        self._socket.set(zmq.MAXMSGSIZE, wire.MAX_MESSAGE_BYTES)
        self._socket.set(zmq.LINGER, 200)
        self._socket.connect(self._endpoint)
        weakref.finalize(self, _drop, self._socket, self._context).atexit = False
        self._loop.add_reader(self._socket.fileno(), self._receive)
        self._tasks = [asyncio.create_task(self._say_hello())]

    def submit(self, request: EngineRequest, sink: Sink) -> None:
        if not self._send(wire.Submit(request)):
            raise Unavailable("the router does not take requests", retry_after_s=1.0)
        self._pending[request.request_id] = _Pending(sink)

    def abort(self, request_id: str) -> None:
        if request_id in self._pending:
            self._send(wire.Abort(request_id))

    def status(self) -> wire.Cluster | None:
        """None before the router was heard, and when it has been silent for 5 s."""
        return None if self._silent_s() > _SILENT_S else self._cluster

    def _silent_s(self) -> float:
        """How long nothing has come from the router. Where that seems long, the socket is looked at first: perhaps it
        was this event loop that was busy."""
        silent_s = time.monotonic() - self._heard_s
        if silent_s > _SILENT_S and asyncio._get_running_loop() is self._loop:
            self._receive()
            silent_s = time.monotonic() - self._heard_s
        return silent_s

    async def ask(self, *, last_steps: int = 0, request_id: str | None = None) -> list[wire.Findings]:
        cluster = self.status()
        if cluster is None:
            raise Unavailable("the router does not answer", retry_after_s=1.0)
        serving = (wire.WorkerState.READY, wire.WorkerState.STALLED, wire.WorkerState.DRAINING)
        expected = sum(w.state in serving for w in cluster.workers)
        answers: list[wire.Findings] = []
        query = self._next_query
        self._next_query += 1
        arriving = self._queries[query] = asyncio.Queue()
        try:
            self._send(wire.Ask(query, last_steps, request_id))
            async with asyncio.timeout(_ANSWER_S):
                while len(answers) < expected:
                    answers.append(await arriving.get())
        except TimeoutError:
            pass  # a worker in a long step answers after it
        finally:
            del self._queries[query]
        return answers

    async def wait_for_ready(self, timeout_s: float) -> wire.Cluster:
        """Until every worker is ready. Raises TimeoutError."""
        async with asyncio.timeout(timeout_s):
            while True:
                cluster = self._cluster
                if cluster is not None and all(w.state is wire.WorkerState.READY for w in cluster.workers):
                    return cluster
                self._changed.clear()
                await self._changed.wait()

    async def close(self) -> None:
        for request_id in list(self._pending):
            self.abort(request_id)
        for task in self._tasks:
            task.cancel()
        await asyncio.wait(self._tasks)
        self._loop.remove_reader(self._socket.fileno())
        self._fail_all(Unavailable.code, "the engine was closed")
        self._socket.close()
        self._context.term()

    def _send(self, message: wire.Message) -> bool:
        """False if the queue is full: the router has taken nothing for very long."""
        try:
            self._socket.send(wire.encode(message), zmq.NOBLOCK)
        except zmq.Again:
            return False
        self._look_again()
        return True

    def _look_again(self) -> None:
        """The descriptor tells of a change once, and sending or an unfinished turn may have used that up."""
        if int(self._socket.get(zmq.EVENTS)) & zmq.POLLIN:
            self._loop.call_soon(self._receive)

    async def _say_hello(self) -> None:
        while True:
            self._send(wire.Hello())
            if self._pending and self._silent_s() > _GONE_S:
                for request_id in self._pending:
                    self.abort(request_id)
                self._fail_all(Unavailable.code, f"the router has been silent for {_GONE_S:.0f} s")
            await asyncio.sleep(_HELLO_EVERY_S)

    def _receive(self) -> None:
        for _ in range(_MOST_FRAMES_A_TURN):
            if self._socket.closed:
                return
            try:
                frame = self._socket.recv(zmq.NOBLOCK)
            except zmq.Again:
                return
            with contextlib.suppress(wire.ProtocolError):
                self._handle(wire.decode_for_client(frame))
        self._look_again()

    def _handle(self, message: wire.ToClient) -> None:
        self._heard_s = time.monotonic()
        if isinstance(message, wire.Cluster):
            before, self._cluster = self._cluster, message
            if before is not None and before.router_epoch != message.router_epoch:
                self._fail_all(Unavailable.code, "the router was restarted")
            self._changed.set()
            return
        if isinstance(message, wire.Findings):
            if (arriving := self._queries.get(message.query)) is not None:
                arriving.put_nowait(message)
            return
        for delta in wire.join_deltas(message.plain, message.full):
            pending = self._pending.get(delta.request_id)
            if pending is None:
                continue
            pending.streamed = True
            if delta.finish_reason is not None:
                del self._pending[delta.request_id]
            pending.sink(delta)

    def _fail_all(self, code: str, message: str) -> None:
        pending, self._pending = self._pending, {}
        for request_id, entry in pending.items():
            code_now = WorkerLost.code if entry.streamed else code
            entry.sink(TokenDelta(request_id, finish_reason="error", error_code=code_now, error_message=message))
