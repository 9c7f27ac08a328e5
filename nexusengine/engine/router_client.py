"""The router's client: what the HTTP server and multi-device engines submit requests through."""

from __future__ import annotations

import asyncio
import contextlib
import threading
import time
import weakref

import zmq
from zmq.utils.monitor import recv_monitor_message

from nexusengine import wire
from nexusengine.engine.client import Sink
from nexusengine.errors import PayloadTooLarge, Unavailable, WorkerLost
from nexusengine.obs.logs import Sparse, get_logger
from nexusengine.process.sockets import readable
from nexusengine.types import EngineRequest, TokenDelta

_HELLO_EVERY_S = 1.0
_SILENT_S, _GONE_S = 5.0, 30.0
_ANSWER_S = 3.0
_RETRY_AFTER_S = 1.0
_HIGH_WATER = 100_000
_MOST_FRAMES_A_TURN = 256
log = get_logger("client")


class _Pending:
    """A request that has no last delta yet. number: how many this client had submitted before."""

    __slots__ = ("number", "sink", "streamed")

    def __init__(self, sink: Sink, number: int) -> None:
        self.sink, self.number, self.streamed = sink, number, False


def _beat(client_of: weakref.ref[RouterClient], closing: threading.Event) -> None:
    """Say Hello every second, whatever the event loop does, without keeping an unused client from being garbage."""
    while (client := client_of()) is not None and client._say_hello():
        del client
        if closing.wait(_HELLO_EVERY_S):
            return


def _drop(socket: zmq.Socket[bytes], monitor: zmq.Socket[bytes], context: zmq.Context[zmq.Socket[bytes]]) -> None:
    """Close what a client left that nobody closed: a garbage context would wait for its sockets for ever."""
    for each in (monitor, socket):
        each.close(linger=0)
    context.term()


class RouterClient:
    """AsyncBackend over a DEALER socket.

    It belongs to one event loop, which watches the socket's file descriptor: a future for every message would cost a
    tenth of a millisecond each. Heartbeats leave from a thread of their own, so that a loop that is held up does not
    look like a client that is gone; the socket is used under a lock. Requests that the router lost, because it ended,
    was restarted, or forgot this client, end at once with an error.

    Args:
        endpoint: of the router, for clients.
    """

    def __init__(self, endpoint: str) -> None:
        self._endpoint = endpoint
        self._pending: dict[str, _Pending] = {}
        self._submitted = 0
        self._cluster: wire.Cluster | None = None
        self._session: tuple[str, int] | None = None
        self._refused: str | None = None
        self._heard_s = 0.0
        self._tasks: list[asyncio.Task[None]] = []
        self._changed = asyncio.Event()
        self._queries: dict[int, asyncio.Queue[wire.DebugReply]] = {}
        self._next_query = 0
        self._lock = threading.Lock()
        self._closing = threading.Event()
        self._complaints = Sparse(log)

    async def start(self) -> None:
        self._heard_s = time.monotonic()
        self._loop = asyncio.get_running_loop()
        self._context = zmq.Context()
        self._socket: zmq.Socket[bytes] = self._context.socket(zmq.DEALER)
        self._socket.set(zmq.SNDHWM, _HIGH_WATER)
        self._socket.set(zmq.RCVHWM, _HIGH_WATER)
        self._socket.set(zmq.MAXMSGSIZE, wire.MAX_MESSAGE_BYTES)
        self._socket.set(zmq.LINGER, 200)
        self._monitor = self._socket.get_monitor_socket(zmq.EVENT_DISCONNECTED)
        self._socket.connect(self._endpoint)
        weakref.finalize(self, _drop, self._socket, self._monitor, self._context).atexit = False
        self._loop.add_reader(self._socket.fileno(), self._receive)
        self._loop.add_reader(self._monitor.fileno(), self._on_disconnected)
        self._on_disconnected()  # its descriptor shows only what comes after a read that found nothing
        beat = (weakref.ref(self), self._closing)
        self._heart = threading.Thread(target=_beat, args=beat, name="router heartbeat", daemon=True)
        self._heart.start()
        self._tasks = [asyncio.create_task(self._watch())]

    def submit(self, request: EngineRequest, sink: Sink) -> None:
        if self._refused is not None:
            raise Unavailable(self._refused)
        number = self._submitted
        if not self._send(wire.Submit(request, number)):
            raise Unavailable("the router does not take requests", retry_after_s=_RETRY_AFTER_S)
        self._pending[request.request_id] = _Pending(sink, number)

    def abort(self, request_id: str) -> None:
        if request_id in self._pending:
            self._send(wire.Abort(request_id))

    def status(self) -> wire.Cluster | None:
        """None before the router was heard, when it has been silent for 5 s, and when it refuses this client."""
        return None if self._refused or self._silent_s() > _SILENT_S else self._cluster

    def _silent_s(self) -> float:
        """Seconds since the router was heard.

        Where that seems long, the socket is read first: perhaps it was this event loop that was busy.
        """
        silent_s = time.monotonic() - self._heard_s
        if silent_s > _SILENT_S and asyncio._get_running_loop() is self._loop:
            self._receive()
            silent_s = time.monotonic() - self._heard_s
        return silent_s

    async def ask(self, *, last_steps: int = 0, request_id: str | None = None) -> list[wire.DebugReply]:
        cluster = self.status()
        if cluster is None:
            raise Unavailable("the router does not answer", retry_after_s=_RETRY_AFTER_S)
        serving = (wire.WorkerState.READY, wire.WorkerState.STALLED)
        expected = sum(w.state in serving for w in cluster.workers)
        replies: list[wire.DebugReply] = []
        query = self._next_query
        self._next_query += 1
        arriving = self._queries[query] = asyncio.Queue()
        try:
            self._send(wire.DebugQuery(query, last_steps, request_id))
            async with asyncio.timeout(_ANSWER_S):
                while len(replies) < expected:
                    replies.append(await arriving.get())
        except TimeoutError:
            pass  # a worker in a long step replies after it
        finally:
            del self._queries[query]
        return replies

    async def wait_for_ready(self, timeout_s: float) -> wire.Cluster:
        """Until every worker is ready. Raises TimeoutError, and ProtocolError if the router refuses this client."""
        async with asyncio.timeout(timeout_s):
            while True:
                if self._refused is not None:
                    raise wire.ProtocolError(self._refused)
                cluster = self._cluster
                if cluster is not None and all(w.state is wire.WorkerState.READY for w in cluster.workers):
                    return cluster
                self._changed.clear()
                await self._changed.wait()

    def shut(self, reason: str) -> None:
        """End every request with this reason, and take no more."""
        self._refused = reason
        self._give_up(reason)

    async def close(self) -> None:
        self.drop()
        await asyncio.wait(self._tasks)

    def drop(self) -> None:
        for request_id in list(self._pending):
            self.abort(request_id)
        self._closing.set()
        self._heart.join()
        for task in self._tasks:
            task.cancel()
        self._loop.remove_reader(self._socket.fileno())
        self._loop.remove_reader(self._monitor.fileno())
        self._fail(list(self._pending), "the engine was closed")
        self._socket.disable_monitor()
        self._monitor.close()
        self._socket.close()
        self._context.term()

    def _send(self, message: wire.Message) -> bool:
        """False if the queue is full: the router has taken nothing for very long."""
        frame = wire.encode(message)
        if len(frame) > wire.MAX_MESSAGE_BYTES:
            raise PayloadTooLarge(
                f"the request is {len(frame)} bytes for the router; it takes {wire.MAX_MESSAGE_BYTES}"
            )
        with self._lock:
            try:
                self._socket.send(frame, zmq.NOBLOCK)
            except zmq.Again:
                return False
            self._submitted += isinstance(message, wire.Submit)
            more = self._unread()
        if more:
            self._loop.call_soon(self._receive)
        return True

    def _unread(self) -> bool:
        """With the lock held, whether there is something to receive.

        The descriptor shows a change once, and sending or an unfinished turn may have used that up.
        """
        return readable(self._socket)

    def _say_hello(self) -> bool:
        """False if the event loop was closed before this client."""
        with self._lock:
            with contextlib.suppress(zmq.Again):  # a full queue: the router has taken nothing for very long
                self._socket.send(wire.encode(wire.Hello(submitted=self._submitted)), zmq.NOBLOCK)
            more = self._unread()
        if more:
            try:
                self._loop.call_soon_threadsafe(self._receive)
            except RuntimeError:
                return False
        return True

    async def _watch(self) -> None:
        """Give up requests when the router has been silent for very long."""
        while True:
            if self._pending and self._silent_s() > _GONE_S:
                self._give_up(f"the router has been silent for {_GONE_S:.0f} s")
            await asyncio.sleep(_HELLO_EVERY_S)

    def _on_disconnected(self) -> None:
        """The router process has ended: what it knew is lost, and what is still on its way to it is not wanted."""
        ended = False
        while True:
            try:
                recv_monitor_message(self._monitor, zmq.NOBLOCK)
            except zmq.Again:
                break
            ended = True
        if ended:
            self._receive()  # what it said last
            self._give_up("the router has ended")

    def _receive(self) -> None:
        for _ in range(_MOST_FRAMES_A_TURN):
            with self._lock:
                if self._socket.closed or not self._unread():
                    return
                frame = self._socket.recv(zmq.NOBLOCK)
            try:
                message = wire.decode_for_client(frame)
            except wire.ProtocolError as error:
                self._complaints.warning("ignored a message of the router: %s", error)
            else:
                self._handle(message)
        self._loop.call_soon(self._receive)

    def _handle(self, message: wire.ToClient) -> None:
        self._heard_s = time.monotonic()
        if isinstance(message, wire.Cluster):
            self._on_cluster(message)
        elif isinstance(message, wire.DebugReply):
            if (arriving := self._queries.get(message.query)) is not None:
                arriving.put_nowait(message)
        elif isinstance(message, wire.Refused):
            if self._refused is None:
                self._refused = f"the router does not take this process: {message.reason}"
                log.error(self._refused)
            self._fail(list(self._pending), self._refused)
            self._changed.set()
        else:
            self._deliver(wire.join_deltas(message.plain, message.full))

    def _on_cluster(self, cluster: wire.Cluster) -> None:
        before, self._session = self._session, (cluster.router_epoch, cluster.session)
        self._cluster = cluster
        if self._session != before:
            restarted = before is None or before[0] != cluster.router_epoch
            message = (
                "the router was restarted" if restarted else "the router gave the request up: this process was silent"
            )
            lost = [request_id for request_id, pending in self._pending.items() if pending.number < cluster.since]
            self._fail(lost, message)
        self._changed.set()

    def _deliver(self, deltas: list[TokenDelta]) -> None:
        for delta in deltas:
            pending = self._pending.get(delta.request_id)
            if pending is None:
                continue
            pending.streamed = True
            if delta.finish_reason is not None:
                del self._pending[delta.request_id]
            pending.sink(delta)

    def _give_up(self, message: str) -> None:
        """End every request, at the router too if it is there after all."""
        for request_id in self._pending:
            self.abort(request_id)
        self._fail(list(self._pending), message)

    def _fail(self, request_ids: list[str], reason: str) -> None:
        """End requests with an error after which they can be tried again."""
        for request_id in request_ids:
            pending = self._pending.pop(request_id)
            error = (WorkerLost if pending.streamed else Unavailable)(reason, retry_after_s=_RETRY_AFTER_S)
            pending.sink(TokenDelta.failed(request_id, error))
