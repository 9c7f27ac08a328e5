"""The router process: moves frames between sockets and RouterCore. The only file of the router with sockets."""

from __future__ import annotations

import os
import queue
import secrets
import time
from logging import DEBUG, WARNING

import zmq

from nexusengine import wire
from nexusengine.kv.hashing import block_hashes
from nexusengine.obs.logs import Sparse, get_logger, setup
from nexusengine.process import child
from nexusengine.process.control import Drain, Listening, RouterBoot, ToChild, WorkerExited
from nexusengine.process.sockets import readable
from nexusengine.router.core import RouterCore
from nexusengine.router.outbox import Outgoing
from nexusengine.router.placement.registry import make_policy
from nexusengine.types import EngineRequest

_HIGH_WATER = 10_000
_MOST_FRAMES_A_TURN = 256
_PAUSE_S = 1.0
log = get_logger("router")


class Broker:
    """The router's sockets and its loop.

    Args:
        front: ZeroMQ endpoint where clients connect.
        back: ZeroMQ endpoint where workers connect.
        snapshot_period_s: how often the core's timer is called.
    """

    def __init__(self, core: RouterCore, front: str, back: str, snapshot_period_s: float) -> None:
        self.core = core
        self._period_s = snapshot_period_s
        self._context = zmq.Context()
        self._front, self._back = self._bind(front), self._bind(back)
        self._control: queue.SimpleQueue[ToChild] = queue.SimpleQueue()
        self._wake = os.eventfd(0, os.EFD_NONBLOCK)
        self._complaints = Sparse(log)

    def _bind(self, endpoint: str) -> zmq.Socket[bytes]:
        socket = self._context.socket(zmq.ROUTER)
        socket.set(zmq.ROUTER_MANDATORY, 1)
        socket.set(zmq.SNDHWM, _HIGH_WATER)
        socket.set(zmq.RCVHWM, _HIGH_WATER)
        socket.set(zmq.MAXMSGSIZE, wire.MAX_MESSAGE_BYTES)
        socket.set(zmq.LINGER, 0)
        before = os.umask(0o177)
        try:
            socket.bind(endpoint)  # for processes of this user alone
        finally:
            os.umask(before)
        return socket

    def control(self, message: ToChild) -> None:
        """Queue a message of the supervisor; from any thread."""
        self._control.put(message)
        os.eventfd_write(self._wake, 1)

    def run(self) -> None:
        """Serve for ever."""
        poller = zmq.Poller()
        for source in (self._front, self._back, self._wake):
            poller.register(source, zmq.POLLIN)
        next_timer_s = turned_s = time.monotonic()
        while True:
            ready = dict(poller.poll(max(0, round(1000 * (next_timer_s - time.monotonic())))))
            before_s, turned_s = turned_s, time.monotonic()
            if turned_s - before_s > self._period_s + _PAUSE_S:
                self.core.paused(turned_s - before_s)
            if self._wake in ready:
                os.eventfd_read(self._wake)
                while not self._control.empty():
                    self._on_control(self._control.get())
            if self._back in ready:
                self._receive(self._back)
            if self._front in ready:
                self._receive(self._front)
            now = time.monotonic()
            if now >= next_timer_s:
                self.core.on_timer(now)
                next_timer_s = now + self._period_s
            self._flush()
            if self._back in ready:
                self.core.prepare(now)  # no token waits for it

    def _receive(self, socket: zmq.Socket[bytes]) -> None:
        for _ in range(_MOST_FRAMES_A_TURN):
            if not readable(socket):
                return
            identity, *frames = socket.recv_multipart(zmq.NOBLOCK)
            now = time.monotonic()
            try:
                if len(frames) != 1:
                    raise wire.ProtocolError(f"a message of {len(frames)} frames")
                if socket is self._front:
                    self.core.on_client(identity, wire.decode_from_client(frames[0]), now)
                else:
                    self.core.on_worker(identity, wire.decode_from_worker(frames[0]), now)
            except wire.ProtocolError as error:
                self._complaints.warning("ignored a message from %r: %s", identity[:64], str(error)[:500])

    def _on_control(self, message: ToChild) -> None:
        match message:
            case WorkerExited():
                self.core.on_worker_exited(
                    message.worker_id,
                    message.epoch,
                    message.cause,
                    message.restarts,
                    time.monotonic(),
                    next_epoch=message.next_epoch,
                )
            case Drain():
                self.core.draining = True

    def _flush(self) -> None:
        """Send what is to be sent.

        A peer that cannot be reached, or whose queue is full, is dropped: a worker counts as gone, a client's requests
        are cancelled. Both may cause further messages.
        """
        while out := self.core.take():
            for outgoing in out:
                self._send(outgoing)

    def _send(self, outgoing: Outgoing) -> None:
        socket = self._front if outgoing.side == "client" else self._back
        try:
            socket.send_multipart([outgoing.identity, wire.encode(outgoing.message)], zmq.NOBLOCK)
        except (zmq.Again, zmq.ZMQError) as error:
            if error.errno not in (zmq.EAGAIN, zmq.EHOSTUNREACH):
                raise
            left = outgoing.side == "client" and error.errno == zmq.EHOSTUNREACH  # as any client may
            log.log(DEBUG if left else WARNING, "gave up %s %r: %s", outgoing.side, outgoing.identity, error)
            if outgoing.side == "client":
                self.core.on_client_gone(outgoing.identity, time.monotonic())
            else:
                self.core.on_worker_gone(outgoing.identity, "cannot be reached", time.monotonic())


def main() -> None:
    boot = child.read_boot(RouterBoot)
    config = boot.config
    setup(config.log_level)
    hash_key = bytes.fromhex(boot.hash_key)

    def hashes(request: EngineRequest, block_size: int) -> list[bytes]:
        return block_hashes(request.prompt_token_ids, block_size, hash_key)

    core = RouterCore(
        make_policy(config.router),
        [wire.WorkerInfo(w.worker_id, w.epoch, 0, w.device, config.model) for w in boot.workers],
        epoch=secrets.token_hex(4),
        max_held=config.max_held,
        report_period_s=config.snapshot_period,
        block_hashes=hashes,
    )
    broker = Broker(core, boot.front, boot.back, config.snapshot_period)
    child.listen(broker.control)
    child.send(Listening())
    broker.run()


if __name__ == "__main__":
    main()
