"""A worker's connection to the router: a thread that owns the socket, so that heartbeats go out during long steps."""

from __future__ import annotations

import os
import threading
import time
from collections import deque
from collections.abc import Callable

import msgspec
import zmq

from nexusengine import wire
from nexusengine.kv.digest import DigestSender
from nexusengine.router.core import identity_of
from nexusengine.types import TokenDelta

_HIGH_WATER = 10_000


class RouterLink:
    """Messages from the router wait in `inbox` until the engine's thread takes them; `wait` sleeps until one comes.

    Before `ready` it reports phases, afterwards the worker's load: both from the link's own thread.
    """

    def __init__(self, endpoint: str, info: wire.WorkerInfo, period_s: float) -> None:
        self.inbox: deque[wire.Dispatch | wire.Cancel | wire.Ask] = deque()
        self._info, self._period_s = info, period_s
        self._load: Callable[[], wire.WorkerLoad] | None = None
        self._in_flight: Callable[[], list[str]] = list
        self._prefixes: DigestSender | None = None
        self._phase, self._fraction = "starting", 0.0
        self._outbox: deque[bytes] = deque()
        self._arrived = threading.Event()
        self._wake = os.eventfd(0, os.EFD_NONBLOCK)
        self._seq = 0
        self._socket: zmq.Socket[bytes] = zmq.Context.instance().socket(zmq.DEALER)
        self._socket.set(zmq.IDENTITY, identity_of(info.worker_id, info.epoch))
        self._socket.set(zmq.SNDHWM, _HIGH_WATER)
        self._socket.set(zmq.RCVHWM, _HIGH_WATER)
        self._socket.set(zmq.MAXMSGSIZE, wire.MAX_MESSAGE_BYTES)
        self._socket.set(zmq.LINGER, 500)
        self._socket.connect(endpoint)
        self._closing = False
        self._thread = threading.Thread(target=self._run, name="router link", daemon=True)
        self._thread.start()

    def phase(self, phase: str, fraction: float) -> None:
        """What the worker is doing before it is ready."""
        self._phase, self._fraction = phase, fraction

    def ready(
        self,
        info: wire.WorkerInfo,
        load: Callable[[], wire.WorkerLoad],
        in_flight: Callable[[], list[str]],
        prefixes: DigestSender | None = None,
    ) -> None:
        """From now on requests may come. in_flight: ids of those it works on, for a router that was restarted.
        prefixes: of the prefix cache; used by the link's thread alone from now on."""
        self._info, self._in_flight, self._prefixes, self._load = info, in_flight, prefixes, load
        self._post(wire.encode(wire.Ready(info)))

    def send(self, deltas: list[TokenDelta]) -> None:
        if deltas:
            self._post(wire.encode(wire.WorkerDeltas(self._info.epoch, *wire.split_deltas(deltas))))

    def tell(self, findings: wire.Findings) -> None:
        self._post(wire.encode(findings))

    def wait(self, timeout_s: float) -> None:
        """Until something is in the inbox, or the time is over."""
        self._arrived.wait(timeout_s)
        self._arrived.clear()

    def leave(self, cause: str) -> None:
        """Say goodbye and flush; the link is of no use afterwards."""
        self._closing = True
        self._post(wire.encode(wire.Leaving(self._info.epoch, cause)))
        self._thread.join(2.0)
        self._socket.close()

    def _post(self, frame: bytes) -> None:
        self._outbox.append(frame)
        os.eventfd_write(self._wake, 1)

    def _run(self) -> None:
        poller = zmq.Poller()
        poller.register(self._socket, zmq.POLLIN)
        poller.register(self._wake, zmq.POLLIN)
        next_report_s = 0.0
        while True:
            ready = dict(poller.poll(max(0, round(1000 * (next_report_s - time.monotonic())))))
            if self._wake in ready:
                os.eventfd_read(self._wake)
            while self._outbox:
                self._socket.send(self._outbox.popleft())
            if self._closing:
                return
            if self._socket in ready:
                self._receive()
            now = time.monotonic()
            if now >= next_report_s:
                next_report_s = now + self._period_s
                self._socket.send(wire.encode(self._heartbeat()))

    def _heartbeat(self) -> wire.Message:
        if self._load is None:
            return wire.Starting(self._info, self._phase, self._fraction)
        self._seq += 1
        digest = None if self._prefixes is None else wire.PrefixDigest(*self._prefixes.take())
        return wire.Report(self._info.epoch, self._seq, self._load(), digest)

    def _receive(self) -> None:
        while True:
            try:
                message = wire.decode_for_worker(self._socket.recv(zmq.NOBLOCK))
            except zmq.Again:
                return
            if self._prefixes is not None and isinstance(message, wire.Reregister | wire.RepeatPrefixes):
                self._prefixes.start_over()
            if isinstance(message, wire.RepeatPrefixes):
                continue
            if isinstance(message, wire.Reregister):
                # A router that does not know us was restarted; it cancels what we name as in flight.
                again = self._heartbeat() if self._load is None else wire.Ready(self._info, tuple(self._in_flight()))
                self._socket.send(wire.encode(again))
                continue
            self.inbox.append(message)
            self._arrived.set()


def with_spec(info: wire.WorkerInfo, **known: object) -> wire.WorkerInfo:
    """The info of a worker once its executor is made."""
    return msgspec.structs.replace(info, **known)
