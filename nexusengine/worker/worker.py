"""The worker process: one engine core on one device, fed by the router."""

from __future__ import annotations

import os
import queue
import sys
from collections.abc import Callable

import msgspec

from nexusengine import wire
from nexusengine.clock import MonotonicClock
from nexusengine.config import ServeConfig, parse_device
from nexusengine.core.engine_core import EngineCore
from nexusengine.errors import InternalError, NexusError
from nexusengine.execute.factory import make_executor
from nexusengine.execute.memory import resident_bytes
from nexusengine.kv.digest import CacheEvents, DigestSender
from nexusengine.loading.resolve import resolve_model
from nexusengine.obs.logs import get_logger, setup
from nexusengine.perf.model import PerformanceModel
from nexusengine.process import child
from nexusengine.types import TokenDelta
from nexusengine.wire import WorkerLoad
from nexusengine.worker.build import executor_options, make_core
from nexusengine.worker.gpu import Telemetry, seen_as
from nexusengine.worker.link import RouterLink, with_spec

_IDLE_WAIT_S = 0.5
log = get_logger("worker")


def serve_requests(core: EngineCore, link: RouterLink, telemetry: Telemetry) -> None:
    """Until the process is ended: take what the router sent, compute a step, send the new tokens."""
    while True:
        heed(telemetry, core.model)
        deltas: list[TokenDelta] = []
        link.receive()
        while link.inbox:
            message = link.inbox.popleft()
            if isinstance(message, wire.Cancel):
                core.abort(message.request_id)  # the router has told the client already
                continue
            if isinstance(message, wire.Ask):
                link.tell(core.findings(message))
                continue
            core.last_dispatch_seq = message.seq
            core.abort(message.request.request_id)  # the router knows nothing of one that has the same id
            try:
                core.add(message.request)
            except NexusError as error:
                deltas.append(
                    TokenDelta(
                        message.request.request_id,
                        finish_reason="error",
                        error_code=error.code,
                        error_message=error.message,
                        retry_after_s=error.retry_after_s,
                    )
                )
        link.send(deltas, core.last_dispatch_seq)
        link.send(core.step(), core.last_dispatch_seq)
        if not core.has_work:
            link.wait(_IDLE_WAIT_S)


def with_memory(load: Callable[[], WorkerLoad]) -> Callable[[], WorkerLoad]:
    """`load` with the memory of this process among its totals."""

    def both() -> WorkerLoad:
        found = load()
        return msgspec.structs.replace(found, totals={**found.totals, "resident_bytes": resident_bytes()})

    return both


def heed(telemetry: Telemetry, model: PerformanceModel) -> None:
    """What the driver says of the GPU's clock lets the model believe sooner that steps take another time."""
    if why := telemetry.news():
        log.debug("%s: a change of step times is expected", why)
        model.expect_change()


def main() -> None:
    given = child.read_config()
    config = ServeConfig(**given["config"])
    setup(config.log_level)
    if given["cores"]:
        os.sched_setaffinity(0, given["cores"])  # before other threads begin: they inherit it
    model_paths: queue.SimpleQueue[str] = queue.SimpleQueue()
    child.listen(lambda message: model_paths.put(message["path"]) if message["type"] == "model" else None)
    device = parse_device(given["device"])
    info = wire.WorkerInfo(given["worker_id"], given["epoch"], os.getpid(), str(device), config.model)

    def refused(reason: str) -> None:
        child.emit({"type": "failed", "message": f"worker on {device}: the router does not take it: {reason}"})
        os._exit(1)

    link = RouterLink(given["back"], info, config.snapshot_period, refused)

    def progress(phase: str, fraction: float) -> None:
        link.phase(phase, fraction)
        child.emit({"type": "phase", "phase": phase, "fraction": fraction})

    try:
        if device.kind != "emulated":
            progress("importing torch", 0.0)
            from nexusengine.execute import torch_executor  # noqa: F401  # while the model is looked for

        path = given["model_path"] or model_paths.get()
        files = resolve_model(path, weights=device.kind != "emulated")
        executor = make_executor(files, seen_as(device, os.environ), executor_options(config, info.worker_id), progress)
        hash_key = bytes.fromhex(given["hash_key"])
        core = make_core(executor, config, MonotonicClock(), info.worker_id, files.config, hash_key)
    except (NexusError, MemoryError, ImportError) as error:
        if isinstance(error, NexusError):
            message = error.message
        elif isinstance(error, ImportError):
            message = f"a package that is needed cannot be imported: {error}"
        else:
            message = "out of memory while loading the model"
        child.emit({"type": "failed", "message": f"worker on {device}: {message}"})
        link.leave(message)
        sys.exit(1)
    spec = executor.spec
    info = with_spec(
        info,
        dtype=spec.dtype,
        attention_backend=spec.attention_backend,
        max_model_len=core.max_model_len,
        max_batch_tokens=spec.max_batch_tokens,
        block_size=spec.block_size,
        kv_total_blocks=core.kv.total_blocks,
        weights_bytes=spec.weights_bytes,
        kv_bytes=spec.kv_bytes,
        scheduler=core.policy.name,
        max_waiting=core.scheduler.max_waiting,
        traits=core.policy.traits,
    )
    prefixes = None
    if core.kv.prefix_caching:
        core.kv.events = CacheEvents(core.kv.block_size)
        prefixes = DigestSender(core.kv.events)
    telemetry = Telemetry(os.environ)
    link.ready(info, telemetry.beside(with_memory(core.load)), core.request_ids, prefixes)
    child.emit({"type": "ready"})
    try:
        serve_requests(core, link, telemetry)
    except Exception as error:  # whatever it is, its requests are told before the process ends
        log.exception("a step failed; the worker ends")
        cause = f"a step failed: {error}"
        link.send(core.fail_all(InternalError.code, cause), core.last_dispatch_seq)
        child.emit({"type": "failed", "message": f"worker on {device}: {cause}"})
        link.leave(cause)
        sys.exit(1)


if __name__ == "__main__":
    main()
