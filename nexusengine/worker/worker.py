"""The worker process: one engine core on one device, fed by the router."""

from __future__ import annotations

import gc
import os
import queue
import sys
from collections.abc import Callable

import msgspec

from nexusengine import wire
from nexusengine.clock import MonotonicClock
from nexusengine.config import DeviceSpec, parse_device
from nexusengine.core.engine_core import EngineCore
from nexusengine.errors import InternalError, NexusError
from nexusengine.execute.factory import make_executor
from nexusengine.execute.memory import resident_bytes
from nexusengine.kv.digest import CacheEvents, DigestSender
from nexusengine.loading.resolve import resolve_model
from nexusengine.obs.logs import get_logger, setup
from nexusengine.perf.model import PerformanceModel
from nexusengine.perf.online import OnlineModel
from nexusengine.process import child
from nexusengine.process.control import Failed, Model, Phase, Ready, WorkerBoot
from nexusengine.types import TokenDelta
from nexusengine.wire import WorkerLoad
from nexusengine.worker.build import executor_options, info_of, make_core, store_of
from nexusengine.worker.gpu import Telemetry, seen_as
from nexusengine.worker.link import RouterLink
from nexusengine.worker.model_store import Saver

_IDLE_WAIT_S = 0.5
log = get_logger("worker")


def serve_requests(core: EngineCore, link: RouterLink, telemetry: Telemetry, saver: Saver | None) -> None:
    """Serve until the process is ended."""
    while True:
        serve_turn(core, link, telemetry, saver)
        if not core.has_work:
            link.wait(_IDLE_WAIT_S)


def serve_turn(core: EngineCore, link: RouterLink, telemetry: Telemetry, saver: Saver | None) -> None:
    """Take what the router sent, compute a step, send the new tokens."""
    apply_telemetry(telemetry, core.scheduler.model)
    if saver is not None:
        saver.tick()
    deltas: list[TokenDelta] = []
    link.receive()
    while link.inbox:
        message = link.inbox.popleft()
        if isinstance(message, wire.Cancel):
            core.abort(message.request_id)  # the client knows it from the router already
            continue
        if isinstance(message, wire.DebugQuery):
            link.send_reply(core.debug_reply(message))
            continue
        core.last_dispatch_seq = message.seq
        core.abort(message.request.request_id)  # the router knows nothing of one that has the same id
        try:
            core.add(message.request)
        except NexusError as error:
            deltas.append(TokenDelta.failed(message.request.request_id, error))
    link.send(deltas, core.last_dispatch_seq)
    link.send_split(core.step_split(), core.last_dispatch_seq)


def with_memory(load: Callable[[], WorkerLoad]) -> Callable[[], WorkerLoad]:
    """`load` with the memory of this process among its counters."""

    def both() -> WorkerLoad:
        found = load()
        return msgspec.structs.replace(found, counters={**found.counters, "resident_bytes": resident_bytes()})

    return both


def apply_telemetry(telemetry: Telemetry, model: PerformanceModel) -> None:
    """Let the model expect a change of step times where the driver says that the GPU's clock has changed."""
    if why := telemetry.take_change():
        log.debug("%s: a change of step times is expected", why)
        model.expect_change()


def main() -> None:
    boot = child.read_boot(WorkerBoot)
    config, identity = boot.config, boot.identity
    setup(config.log_level)
    if boot.cores:
        os.sched_setaffinity(0, boot.cores)  # before other threads begin: they inherit it
    model_paths: queue.SimpleQueue[str] = queue.SimpleQueue()
    child.listen(lambda message: model_paths.put(message.path) if isinstance(message, Model) else None)
    device = parse_device(identity.device)
    info = wire.WorkerInfo(identity.worker_id, identity.epoch, os.getpid(), str(device), config.public_name)

    def failed(cause: str) -> None:
        child.send(Failed(f"worker on {device}: {cause}"))

    def refused(reason: str) -> None:
        failed(f"the router does not take it: {reason}")
        os._exit(1)

    link = RouterLink(boot.back, info, config.snapshot_period, refused)
    try:
        core, saver = load_core(boot, device, link, lambda: boot.model_path or model_paths.get())
    except (NexusError, MemoryError, ImportError) as error:
        cause = load_failure(error)
        failed(cause)
        link.leave(cause)
        sys.exit(1)
    telemetry = Telemetry(os.environ)
    link.ready(info_of(core, info), telemetry.beside(with_memory(core.load)), core.request_ids, prefix_digest(core))
    gc.collect()
    gc.freeze()  # what is there by now stays, and need not be looked through while requests are served
    child.send(Ready())
    try:
        serve_requests(core, link, telemetry, saver)
    except Exception as error:  # whatever it is, its requests are ended before the process is
        log.exception("a step failed; the worker ends")
        cause = f"a step failed: {error}"
        link.send(core.fail_all(InternalError.code, cause), core.last_dispatch_seq)
        failed(cause)
        link.leave(cause)
        sys.exit(1)


def load_core(
    boot: WorkerBoot, device: DeviceSpec, link: RouterLink, model_path: Callable[[], str]
) -> tuple[EngineCore, Saver | None]:
    """Make the executor and the core, saying how far that is, and what keeps its step times.

    Args:
        model_path: waits until the model was found.

    Raises:
        NexusError, MemoryError, ImportError: see `load_failure`.
    """

    def progress(phase: str, fraction: float) -> None:
        link.phase(phase, fraction)
        child.send(Phase(phase, fraction))

    if device.kind != "emulated":
        progress("importing torch", 0.0)
        from nexusengine.execute import torch_executor  # noqa: F401  # while the model is looked for

    config, worker_id = boot.config, boot.identity.worker_id
    files = resolve_model(model_path(), weights=device.kind != "emulated")
    executor = make_executor(files, seen_as(device, os.environ), executor_options(config, worker_id), progress)
    store = store_of(config, executor.spec, files.config)
    core = make_core(executor, config, MonotonicClock(), worker_id, files.config, bytes.fromhex(boot.hash_key), store)
    model = core.scheduler.model
    return core, Saver(store, model) if store is not None and isinstance(model, OnlineModel) else None


def load_failure(error: Exception) -> str:
    """The cause, for the user, of what `load_core` raised."""
    if isinstance(error, NexusError):
        return error.message
    if isinstance(error, ImportError):
        return f"a package that is needed cannot be imported: {error}"
    return "out of memory while loading the model"


def prefix_digest(core: EngineCore) -> DigestSender | None:
    """Reports the prefix cache to the router; None where there is no prefix cache."""
    if not core.kv.prefix_caching:
        return None
    core.kv.events = CacheEvents(core.kv.block_size)
    return DigestSender(core.kv.events)


if __name__ == "__main__":
    main()
