"""A worker's connection to the router.

The engine's thread sends and receives by itself, so that no hand-over between threads stands between a token and its
client; a thread of the link's own sends reports, during long steps too.
"""

from __future__ import annotations

import os
import select
import threading
from collections import deque
from collections.abc import Callable

import zmq

from nexusengine import wire
from nexusengine.kv.digest import DigestSender
from nexusengine.obs.logs import Sparse, get_logger
from nexusengine.process.sockets import readable
from nexusengine.types import TokenDelta
from nexusengine.wire import identity_of

_HIGH_WATER = 10_000
log = get_logger("worker")


class RouterLink:
    """The worker's socket to the router.

    Messages from the router wait in `inbox` until the engine's thread takes them; `receive` fetches them there, and
    `wait` sleeps until one comes. Before `ready` the link reports phases, afterwards the worker's load: both every
    period, from a thread of its own, which replies to the router meanwhile if the engine's thread is in a long step.
    The socket is used under a lock.

    Args:
        on_refused: called, in either thread, if the router does not take this worker.
    """

    def __init__(
        self,
        endpoint: str,
        info: wire.WorkerInfo,
        period_s: float,
        on_refused: Callable[[str], None] = lambda reason: None,
    ) -> None:
        self.inbox: deque[wire.Dispatch | wire.Cancel | wire.DebugQuery] = deque()
        self._info, self._period_s, self._on_refused = info, period_s, on_refused
        self._complaints = Sparse(log)
        self._load: Callable[[], wire.WorkerLoad] | None = None
        self._in_flight: Callable[[], list[str]] = list
        self._prefixes: DigestSender | None = None
        self._phase, self._fraction = "starting", 0.0
        self._seq = 0
        self._socket: zmq.Socket[bytes] = zmq.Context.instance().socket(zmq.DEALER)
        self._socket.set(zmq.IDENTITY, identity_of(info.worker_id, info.epoch))
        self._socket.set(zmq.SNDHWM, _HIGH_WATER)
        self._socket.set(zmq.RCVHWM, _HIGH_WATER)
        self._socket.set(zmq.MAXMSGSIZE, wire.MAX_MESSAGE_BYTES)
        self._socket.set(zmq.LINGER, 500)
        self._socket.connect(endpoint)
        self._lock = threading.Lock()
        self._wake = os.eventfd(0, os.EFD_NONBLOCK)  # wakes a waiting engine for what the link's thread has received
        self._poll = select.poll()
        self._poll.register(self._socket.fileno(), select.POLLIN)
        self._poll.register(self._wake, select.POLLIN)
        self._closing = threading.Event()
        self._thread = threading.Thread(target=self._report, name="router link", daemon=True)
        self._thread.start()

    def phase(self, phase: str, fraction: float) -> None:
        """Set what start-up is doing, for the next report. fraction: of it done, 0..1."""
        self._phase, self._fraction = phase, min(max(fraction, 0.0), 1.0)

    def ready(
        self,
        info: wire.WorkerInfo,
        load: Callable[[], wire.WorkerLoad],
        in_flight: Callable[[], list[str]],
        prefixes: DigestSender | None = None,
    ) -> None:
        """Report once, then say that requests may come from now on.

        Args:
            in_flight: returns the ids of requests that it works on, for a router that was restarted.
            prefixes: of the prefix cache; used by the link alone from now on.
        """
        with self._lock:
            self._info, self._in_flight, self._prefixes, self._load = info, in_flight, prefixes, load
            self._exchange(self._heartbeat())
            self._exchange(wire.Ready(info))

    def send(self, deltas: list[TokenDelta], last_dispatch_seq: int) -> None:
        """Send deltas."""
        self.send_split(wire.split_deltas(deltas), last_dispatch_seq)

    def send_split(self, split: wire.Split, last_dispatch_seq: int) -> None:
        """Send new tokens.

        ZeroMQ's own thread puts them on the wire; woken on this core, it would wait for the engine's thread to finish
        planning and more, so that goes behind it.

        Args:
            last_dispatch_seq: the last dispatch that was seen before they were computed.
        """
        plain, full = split
        if plain or full:
            with self._lock:
                self._exchange(wire.WorkerDeltas(plain, full, last_dispatch_seq))
            os.sched_yield()

    def send_reply(self, reply: wire.DebugReply) -> None:
        """Answer a `DebugQuery`."""
        with self._lock:
            self._exchange(reply)

    def receive(self) -> None:
        """Put what has come into the inbox."""
        with self._lock:
            self._exchange()

    def wait(self, timeout_s: float) -> None:
        """Until something is in the inbox, or the time is over."""
        self.receive()
        if not self.inbox:
            if any(descriptor == self._wake for descriptor, _ in self._poll.poll(1000.0 * timeout_s)):
                os.eventfd_read(self._wake)
            self.receive()

    def leave(self, cause: str) -> None:
        """Say goodbye and flush; the link is of no use afterwards."""
        self._closing.set()
        self._thread.join(2.0)
        with self._lock:
            self._exchange(wire.Leaving(cause))
            self._socket.close()

    def _report(self) -> None:
        while not self._closing.is_set():
            with self._lock:
                self._exchange(self._heartbeat())
            if self.inbox:
                os.eventfd_write(self._wake, 1)
            self._closing.wait(self._period_s)

    def _heartbeat(self) -> wire.Message:
        if self._load is None:
            return wire.Starting(self._info, self._phase, self._fraction)
        self._seq += 1
        digest = None if self._prefixes is None else wire.PrefixDigest(*self._prefixes.take())
        return wire.Report(self._seq, self._load(), digest)

    def _exchange(self, message: wire.Message | None = None) -> None:
        """With the lock held, send, then take all that has come.

        The socket's descriptor shows a change once, and any use of the socket may use that up; so none ends without
        looking.
        """
        if message is not None:
            self._socket.send(wire.encode(message))
        while readable(self._socket):
            frame = self._socket.recv(zmq.NOBLOCK)
            try:
                arrived = wire.decode_for_worker(frame)
            except wire.ProtocolError as error:
                self._complaints.warning("ignored a message of the router: %s", error)
            else:
                self._take(arrived)

    def _take(self, message: wire.ToWorker) -> None:
        if isinstance(message, wire.Refused):
            self._on_refused(message.reason)
            return
        if self._prefixes is not None and isinstance(message, wire.Reregister | wire.RepeatPrefixes):
            self._prefixes.start_over()
        if isinstance(message, wire.Reregister):
            # A router that does not know us was restarted; it cancels what we name as in flight.
            again = self._heartbeat()
            if self._load is not None:
                again = wire.Ready(
                    self._info, tuple(self._in_flight()), last_dispatch_seq=self._load().last_dispatch_seq
                )
            self._socket.send(wire.encode(again))
        elif not isinstance(message, wire.RepeatPrefixes):
            self.inbox.append(message)
