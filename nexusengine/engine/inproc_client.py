"""An engine core in this process behind the AsyncBackend protocol: it runs in a thread of its own."""

from __future__ import annotations

import asyncio
import threading
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from nexusengine import wire
from nexusengine.core.engine_core import EngineCore
from nexusengine.engine import lifetime
from nexusengine.engine.client import Sink
from nexusengine.errors import InternalError, NexusError, Unavailable
from nexusengine.obs.logs import get_logger
from nexusengine.types import EngineRequest, TokenDelta
from nexusengine.worker.build import info_of

_IDLE_WAIT_S = 0.5
_ANSWER_S = 3.0
_JOIN_EVERY_S = 0.002
_LAST_STEP_S = 10.0  # at exit: a step under way is waited for, but not for ever
log = get_logger("engine")


@dataclass(frozen=True, slots=True)
class _Query:
    """A question to the core from the event loop."""

    query: wire.DebugQuery
    answered: asyncio.Future[wire.DebugReply]

    def reply(self, reply: wire.DebugReply) -> None:
        if not self.answered.done():
            self.answered.set_result(reply)


class LocalBackend:
    """One hop to the event loop for all new tokens of a step."""

    def __init__(self, core: EngineCore, model: str) -> None:
        self.core = core
        self._model = model
        self._commands: deque[EngineRequest | str | _Query] = deque()
        self._arrived = threading.Event()
        self._sinks: dict[str, Sink] = {}
        self._failure: str | None = None
        self._closing = False
        self._thread = threading.Thread(target=self._run, name="engine core", daemon=True)

    async def start(self) -> None:
        self._loop = asyncio.get_running_loop()
        lifetime.started(self)
        self._thread.start()

    def submit(self, request: EngineRequest, sink: Sink) -> None:
        if self._failure is not None or self._closing:
            failure, closed = self._failure, Unavailable("the engine was closed")
            sink(TokenDelta.failed(request.request_id, InternalError(failure) if failure else closed))
            return
        self._sinks[request.request_id] = sink
        self._commands.append(request)
        self._arrived.set()

    def abort(self, request_id: str) -> None:
        if request_id in self._sinks:
            self._commands.append(request_id)
            self._arrived.set()

    def status(self) -> wire.Cluster:
        device = self.core.executor.spec.device
        info = info_of(self.core, wire.WorkerInfo("w0", "local", 0, device, self._model))
        state = wire.WorkerState.GONE if self._failure else wire.WorkerState.READY
        worker = wire.WorkerStatus(info, state, "ready", 1.0, len(self._sinks), self.core.load(), cause=self._failure)
        return wire.Cluster("local", (worker,), ledger=len(self._sinks))

    async def ask(self, *, last_steps: int = 0, request_id: str | None = None) -> list[wire.DebugReply]:
        if self._failure is not None or self._closing:
            raise Unavailable(self._failure or "the engine was closed")
        query = _Query(wire.DebugQuery(0, last_steps, request_id), self._loop.create_future())
        self._commands.append(query)
        self._arrived.set()
        try:
            return [await asyncio.wait_for(query.answered, _ANSWER_S)]
        except TimeoutError:
            return []

    async def close(self) -> None:
        self.stop()
        while self._thread.is_alive():  # no thread to join it in: at the exit of an interpreter there is none
            await asyncio.sleep(_JOIN_EVERY_S)
        self._fail_all(Unavailable("the engine was closed"))
        self.core.executor.close()

    def drop(self) -> None:
        self.stop()

    def stop(self) -> None:
        """Let the thread end after its step; from any thread."""
        self._closing = True
        self._arrived.set()

    def end(self) -> None:
        self.stop()
        self._thread.join(_LAST_STEP_S)

    def forget(self) -> None:
        """Nothing to let go of."""

    def _run(self) -> None:
        try:
            while not self._closing:
                deltas = self._take_commands()
                deltas += self.core.step()
                if deltas:
                    self._call(self._deliver, deltas)
                if not self.core.has_work:
                    self._arrived.wait(_IDLE_WAIT_S)
                    self._arrived.clear()
        except Exception as error:  # whatever it is, the requests in flight must end
            log.exception("a step failed; the engine is of no more use")
            self._failure = f"a step failed: {error}"
            self._call(self._fail_all, InternalError(self._failure))
        finally:
            lifetime.ended(self)

    def _call(self, callback: Callable[..., None], *args: Any) -> None:
        """Call it in the event loop. Where that has ended without closing the engine, nobody listens any more."""
        try:
            self._loop.call_soon_threadsafe(callback, *args)
        except RuntimeError:
            if not self._loop.is_closed():
                raise
            self._closing = True

    def _take_commands(self) -> list[TokenDelta]:
        deltas: list[TokenDelta] = []
        while self._commands:
            command = self._commands.popleft()
            if isinstance(command, str):
                if (delta := self.core.abort(command)) is not None:
                    deltas.append(delta)
                continue
            if isinstance(command, _Query):
                self._call(command.reply, self.core.debug_reply(command.query))
                continue
            try:
                self.core.add(command)
            except NexusError as error:
                deltas.append(TokenDelta.failed(command.request_id, error))
        return deltas

    def _deliver(self, deltas: list[TokenDelta]) -> None:
        for delta in deltas:
            sink = self._sinks.get(delta.request_id)
            if sink is None:
                continue
            if delta.finish_reason is not None:
                del self._sinks[delta.request_id]
            sink(delta)

    def _fail_all(self, error: NexusError) -> None:
        """End every request, also those that the core has not seen yet."""
        sinks, self._sinks = self._sinks, {}
        for request_id, sink in sinks.items():
            sink(TokenDelta.failed(request_id, error))
