"""How Engine and AsyncEngine are started: settings, a core in this process, or processes of their own."""

from __future__ import annotations

import asyncio
import dataclasses
import threading
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any, ParamSpec, TypeVar

from nexusengine import native
from nexusengine.clock import MonotonicClock
from nexusengine.config import EngineConfig, ServeConfig, load, parse_devices
from nexusengine.core.engine_core import EngineCore
from nexusengine.engine import lifetime
from nexusengine.engine.client import AsyncBackend
from nexusengine.engine.inproc_client import LocalBackend
from nexusengine.engine.router_client import RouterClient
from nexusengine.errors import ConfigError, NexusError
from nexusengine.execute.factory import make_executor
from nexusengine.loading.resolve import resolve_model
from nexusengine.supervisor.events import Event, Ready
from nexusengine.supervisor.supervisor import Supervisor
from nexusengine.tokenize import Tokenizer, load_tokenizer
from nexusengine.worker.build import executor_options, make_core

_JOIN_EVERY_S = 0.01
P = ParamSpec("P")
T = TypeVar("T")


def engine_config(model: str, devices: str | Sequence[str] | None, settings: dict[str, Any]) -> EngineConfig:
    """Settings given in Python. Raises ConfigError for a name or value that does not exist."""
    unknown = sorted(set(settings) - set(EngineConfig.__dataclass_fields__))
    if unknown:
        raise ConfigError(f"unknown setting {unknown[0]!r}", param=unknown[0])
    if devices is not None:
        settings["devices"] = devices if isinstance(devices, str) else ",".join(devices)
    return load(EngineConfig, {**settings, "model": model})


def make_local(config: EngineConfig) -> tuple[EngineCore, Tokenizer, int]:
    """The core of a one-device engine, its tokenizer and the size of its vocabulary."""
    device = parse_devices(config.devices)[0]
    if device.kind == "cpu":  # while the model is looked for and torch imported
        threading.Thread(target=native.prepare, daemon=True, name="compile kernels").start()
    files = resolve_model(config.model, revision=config.revision, weights=device.kind != "emulated")
    tokenizer = load_tokenizer(files)
    executor = make_executor(files, device, executor_options(config))
    return make_core(executor, config, MonotonicClock(), geometry=files.config), tokenizer, files.config.vocab_size


@dataclass(frozen=True, slots=True)
class Started:
    """A client that is started, and what belongs to it.

    Attributes:
        backend: started.
        vocab_size: number of token ids.
        supervisor: of the processes behind the backend, where they are this engine's own.
    """

    backend: AsyncBackend
    tokenizer: Tokenizer
    vocab_size: int
    supervisor: SupervisorThread | None = None


async def start_backend(config: EngineConfig) -> Started:
    """One device: a core in a thread of this process. Several: router and workers in processes of their own."""
    if len(parse_devices(config.devices)) == 1:
        core, tokenizer, vocab_size = await _in_thread(make_local, config)
        local = LocalBackend(core, config.model)
        await local.start()
        return Started(local, tokenizer, vocab_size)
    supervisor = SupervisorThread(config)
    client = RouterClient(supervisor.front)
    started = False
    try:
        files = await _in_thread(resolve_model, config.model, revision=config.revision, weights=False)
        tokenizer = await _in_thread(load_tokenizer, files)
        await _in_thread(supervisor.wait_until_ready)
        await client.start()
        started = True
        await client.wait_for_ready(10.0)
    except BaseException:
        if started:
            await client.close()
        await supervisor.closed()
        raise
    return Started(client, tokenizer, files.config.vocab_size, supervisor)


async def _in_thread(work: Callable[P, T], *args: P.args, **kwargs: P.kwargs) -> T:
    """Run blocking work in a thread that ends with it; asyncio's own would stay until the loop is closed."""
    pool = ThreadPoolExecutor(1, thread_name_prefix="engine start")
    try:
        return await asyncio.get_running_loop().run_in_executor(pool, lambda: work(*args, **kwargs))
    finally:
        pool.shutdown(wait=False)


class SupervisorThread:
    """A supervisor without HTTP, in a thread of the caller's process. Ends with that process at the latest."""

    def __init__(self, config: EngineConfig) -> None:
        self._ready = threading.Event()
        self._failure: BaseException | None = None
        serve = ServeConfig(**dataclasses.asdict(config))
        self._supervisor = Supervisor(serve, with_server=False, on_event=self._on_event)
        self._thread = threading.Thread(target=self._run, name="supervisor", daemon=True)
        lifetime.started(self)
        self._thread.start()

    @property
    def front(self) -> str:
        return self._supervisor.front

    def wait_until_ready(self) -> None:
        """Raises what kept the workers from starting."""
        self._ready.wait()
        if self._failure is not None:
            raise self._failure

    def stop(self) -> None:
        """Let all processes end; does not wait for them."""
        self._supervisor.stop()

    def close(self) -> None:
        """End all processes."""
        self.stop()
        self._thread.join()

    end = close

    async def closed(self) -> None:
        """`close`, in an event loop; needs no further thread, so that it works at the exit of an interpreter too."""
        self.stop()
        while self._thread.is_alive():
            await asyncio.sleep(_JOIN_EVERY_S)

    def forget(self) -> None:
        self._supervisor.forget_children()

    def _on_event(self, event: Event) -> None:
        if isinstance(event, Ready):
            self._ready.set()

    def _run(self) -> None:
        try:
            self._supervisor.run()
        except NexusError as error:
            self._failure = error
        finally:
            lifetime.ended(self)
            self._ready.set()
