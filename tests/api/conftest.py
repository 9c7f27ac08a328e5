"""The HTTP application over a real engine core on the fake device, on a real port."""

from __future__ import annotations

import asyncio
import socket
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import pytest
import uvicorn

from nexusengine.clock import MonotonicClock
from nexusengine.config import ServeConfig
from nexusengine.core.engine_core import EngineCore
from nexusengine.engine.async_engine import AsyncEngine
from nexusengine.engine.inproc_client import LocalBackend
from nexusengine.loading.sampling_defaults import SamplingDefaults
from nexusengine.perf.registry import make_model
from nexusengine.scheduler.baselines.fcfs import FCFS
from nexusengine.server.process import http_config
from nexusengine.server.recorder import Recorder
from nexusengine.server.state import ServerState
from nexusengine.tokenize.chat_template import ChatTemplate
from nexusengine.tokenize.incremental import IncrementalDetokenizer
from tests.support.fakes import VOCABULARY, FakeExecutor

MODEL = "fake"


class FakeTokenizer:
    """Token i is the printable character i + 32."""

    bos_token_id, eos_token_ids, vocab_size = None, (), VOCABULARY

    def __init__(self) -> None:
        self.sampling_defaults = SamplingDefaults()
        self.template = ChatTemplate("{% for m in messages %}{{ m.role }}: {{ m.content }}\n{% endfor %}", {}, "fake")

    def encode(self, text: str, add_special_tokens: bool = True) -> list[int]:
        return [(ord(c) - 32) % VOCABULARY for c in text]

    def special_token_id(self, text: str) -> int | None:
        return None

    def decode(self, token_ids: Sequence[int], skip_special_tokens: bool = True) -> str:
        return "".join(chr(i + 32) for i in token_ids)

    def token_str(self, token_id: int) -> str:
        return chr(token_id + 32)

    def token_bytes(self, token_id: int) -> bytes:
        return self.token_str(token_id).encode()

    def stream(self, skip_special_tokens: bool = True, context: Sequence[int] = ()) -> IncrementalDetokenizer:
        return IncrementalDetokenizer(self.decode, context=context)

    def render_chat(self, messages: Sequence[Any], /, **options: Any) -> str:
        return self.template.render(messages, **options)

    def close(self) -> None:
        self.template.close()

    def encode_chat(self, messages: Sequence[Any], **extra: Any) -> list[int]:
        return self.encode(self.render_chat(messages))


class SlowExecutor(FakeExecutor):
    """Takes `real_s` seconds a step, so that clients can leave in the middle; fails once it is `broken`."""

    real_s, broken = 0.0, False

    def collect(self) -> Any:
        time.sleep(self.real_s)
        if self.broken:
            raise RuntimeError("the device fell off the bus")
        return super().collect()


@dataclass
class Running:
    """A server, and what is behind it."""

    url: str
    core: EngineCore
    executor: SlowExecutor
    state: ServerState

    def idle(self, timeout_s: float = 5.0) -> bool:
        """Whether everything comes to rest: no request, no KV block."""
        until_s = time.monotonic() + timeout_s
        while time.monotonic() < until_s:
            if not self.core.has_work and self.core.kv.used_blocks == 0 and self.state.in_progress == 0:
                return True
            time.sleep(0.01)
        return False


@pytest.fixture
def start_server() -> Iterator[Callable[..., Running]]:
    """`start_server(setting=value, ...)`: a server with these settings of ServeConfig."""
    stops: list[Callable[[], None]] = []

    def start(*, real_s: float = 0.0, with_engine: bool = True, **settings: Any) -> Running:
        executor = SlowExecutor(num_blocks=512, max_model_len=400, max_batch_tokens=512)
        executor.real_s = real_s
        core = EngineCore(
            executor,
            FCFS(),
            make_model(),
            clock=MonotonicClock(),
            max_running=32,
            max_waiting=256,
            check_every_step=True,
        )
        config = ServeConfig(**settings)
        state = ServerState(config, MODEL, recorder=Recorder(config) if config.record_trace else None)
        listening = socket.create_server(("127.0.0.1", 0))
        server = uvicorn.Server(http_config(state))
        backend = LocalBackend(core, MODEL)

        started = threading.Event()

        async def serve() -> None:
            await backend.start()
            if with_engine:
                state.engine = AsyncEngine.from_client(backend, FakeTokenizer(), VOCABULARY)  # type: ignore[arg-type]
            started.set()
            await server.serve([listening])
            await backend.close()

        thread = threading.Thread(target=lambda: asyncio.run(serve()), daemon=True)
        thread.start()
        assert started.wait(5)

        def stop() -> None:
            server.should_exit = True
            thread.join(10)
            assert not thread.is_alive()

        stops.append(stop)
        return Running(f"http://127.0.0.1:{listening.getsockname()[1]}", core, executor, state)

    yield start
    for stop in stops:
        stop()


@pytest.fixture
def server(start_server: Callable[..., Running]) -> Running:
    return start_server()
