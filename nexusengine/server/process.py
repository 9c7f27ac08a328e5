"""The server process once it is bound: HTTP at once, requests when tokenizer and a worker are there."""

from __future__ import annotations

import asyncio
import contextlib
import gc
import os
import socket
import threading
from collections.abc import Coroutine, Iterator
from typing import Any

import uvicorn

from nexusengine.config import ServeConfig
from nexusengine.engine.async_engine import AsyncEngine
from nexusengine.engine.router_client import RouterClient
from nexusengine.errors import NexusError
from nexusengine.loading.resolve import resolve_model
from nexusengine.obs.logs import get_logger
from nexusengine.process import child
from nexusengine.process.control import Drain, Drained, Failed, Model, Phase, Ready, ToChild
from nexusengine.process.event_loop import loop_factory
from nexusengine.server.app import create_app
from nexusengine.server.protocol import http_protocol
from nexusengine.server.recorder import Recorder
from nexusengine.server.state import ServerState
from nexusengine.tokenize import load_tokenizer
from nexusengine.wire import DebugReply

_LAST_WORDS_S = 0.8
_LOOKED_AT_EVERY_S = 0.02
log = get_logger("server")


class Control:
    """Acts on the supervisor's messages, which arrive in another thread."""

    def __init__(self, state: ServerState, front: str) -> None:
        self.state, self._front = state, front
        self._loop: asyncio.AbstractEventLoop | None = None
        self._server: uvicorn.Server | None = None
        self._client: RouterClient | None = None
        self._early: list[ToChild] = []
        self._lock = threading.Lock()
        self._tasks: set[asyncio.Task[None]] = set()

    def attach(self, loop: asyncio.AbstractEventLoop, server: uvicorn.Server) -> None:
        with self._lock:
            self._loop, self._server = loop, server
            for message in self._early:
                loop.call_soon(self._handle, message)

    def on_message(self, message: ToChild) -> None:
        with self._lock:
            if self._loop is None:
                self._early.append(message)
            else:
                self._loop.call_soon_threadsafe(self._handle, message)

    def on_end(self) -> None:
        """The supervisor is gone or wants the end: end what is under way, with a moment to write that."""
        if self._loop is not None:
            self._loop.call_soon_threadsafe(self._end)
        threading.Timer(_LAST_WORDS_S, self.leave).start()

    def leave(self) -> None:
        """End this process, and before it those that render chat templates; write what was recorded."""
        if self.state.recorder is not None:
            self.state.recorder.close()
        if self.state.engine is not None:
            self.state.engine.tokenizer.close()
        os._exit(0)

    def _end(self) -> None:
        if self._client is not None:
            self._client.shut("the server is shutting down")
        if self._server is not None:
            self._server.should_exit = True

    def _keep(self, work: Coroutine[Any, Any, None]) -> None:
        task = asyncio.ensure_future(work)
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)

    def _handle(self, message: ToChild) -> None:
        match message:
            case Phase():
                self.state.phase, self.state.fraction = message.phase, message.fraction
            case Drain():
                self.state.draining = True
                self._keep(self._drain())
            case Model():
                self._keep(self._load(message))

    async def _drain(self) -> None:
        while self.state.in_progress:
            await asyncio.sleep(_LOOKED_AT_EVERY_S)
        if self.state.recorder is not None and self._client is not None:
            await self.state.recorder.steps.look(self._newest_steps)
        child.send(Drained())

    async def _newest_steps(self, count: int) -> list[DebugReply]:
        assert self._client is not None
        return await self._client.ask(last_steps=count)

    async def _load(self, model: Model) -> None:
        try:
            files = await asyncio.to_thread(resolve_model, model.path, weights=False)
            tokenizer = await asyncio.to_thread(load_tokenizer, files)
            await asyncio.to_thread(tokenizer.prepare)
        except Exception as error:  # whatever the reason, it must not stay "starting" for ever
            log.debug("loading the tokenizer failed", exc_info=True)
            reason = f"cannot load the tokenizer of {model.path}: {error!r}"
            if isinstance(error, NexusError):
                reason = error.message
            child.send(Failed(reason))
            os._exit(1)
        client = self._client = RouterClient(self._front)
        await client.start()
        self.state.engine = AsyncEngine.from_client(client, tokenizer, files.config.vocab_size)
        self.state.model_name = model.name
        if self.state.recorder is not None:
            self._keep(self.state.recorder.steps.watch(self._newest_steps, lambda: self.state.in_progress > 0))
        gc.collect()
        gc.freeze()  # what is there by now stays, and need not be looked through while requests are served
        child.send(Ready())


class _Server(uvicorn.Server):
    """Leaves signals to the supervisor: Ctrl-C reaches every process of the terminal's group."""

    @contextlib.contextmanager
    def capture_signals(self) -> Iterator[None]:
        yield


def http_config(state: ServerState) -> uvicorn.Config:
    """The application with the protocol that bounds what a connection may do."""
    return uvicorn.Config(
        create_app(state),
        http=http_protocol(state.config.header_timeout),
        ws="none",
        log_level="warning",
        access_log=False,
        proxy_headers=False,  # nobody asks where a request came from
        lifespan="off",
        timeout_graceful_shutdown=1,
        timeout_keep_alive=30,
        server_header=False,
    )


async def serve(state: ServerState, control: Control, listening: socket.socket) -> None:
    server = _Server(http_config(state))
    control.attach(asyncio.get_running_loop(), server)
    await server.serve([listening])


def run(config: ServeConfig, front: str, listening: socket.socket, recorder: Recorder | None = None) -> None:
    """Until the supervisor closes this process's stdin. front: the router's endpoint for clients."""
    state = ServerState(config, config.public_name, recorder=recorder)
    control = Control(state, front)
    child.listen(control.on_message, control.on_end)
    with asyncio.Runner(loop_factory=loop_factory()) as runner:
        runner.run(serve(state, control, listening))
    control.leave()
