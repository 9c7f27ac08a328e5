"""From settings to an engine core: the one place where executor, policy and performance model come together."""

from __future__ import annotations

import os
from pathlib import Path

import msgspec

from nexusengine.clock import Clock
from nexusengine.config import EngineConfig, parse_devices
from nexusengine.core.engine_core import EngineCore
from nexusengine.execute.base import Executor, ExecutorOptions, ExecutorSpec
from nexusengine.execute.memory import give_back_freed
from nexusengine.model_config import ModelConfig
from nexusengine.obs.logs import get_logger
from nexusengine.perf.model import PerformanceModel
from nexusengine.perf.online import OnlineModel
from nexusengine.perf.prior import Prior
from nexusengine.perf.registry import make_model
from nexusengine.scheduler.registry import make_policy
from nexusengine.wire import WorkerInfo
from nexusengine.worker.calibrate import calibrate
from nexusengine.worker.model_store import ModelStore, folder_of, kind_of
from nexusengine.worker.priors import prior_of
from nexusengine.worker.resume import resumed
from nexusengine.worker.step_recorder import StepRecorder

log = get_logger("worker")


def executor_options(config: EngineConfig, worker: str = "") -> ExecutorOptions:
    """The options of an executor. worker: id, for its log."""
    return ExecutorOptions(
        dtype=None if config.dtype == "auto" else config.dtype,
        quantization=config.quantization,  # type: ignore[arg-type]  # one of them, the settings' parser saw to it
        max_model_len=config.max_model_len,
        kv_cache_bytes=config.kv_cache_memory,
        fp8_kv=config.kv_cache_dtype == "fp8",
        block_size=config.block_size,
        max_batch_tokens=config.max_batch_tokens,
        max_running=config.max_running,
        attention_backend=config.attention_backend,
        seed=config.seed,
        worker=worker,
        overlap=None if config.async_scheduling else False,
        enforce_eager=config.enforce_eager,
    )


def make_core(
    executor: Executor,
    config: EngineConfig,
    clock: Clock,
    name: str = "w0",
    geometry: ModelConfig | None = None,
    hash_key: bytes = b"",
    store: ModelStore | None = None,
) -> EngineCore:
    """Make an engine core with its policy and performance model; takes up to two seconds for calibration.

    Args:
        name: the worker's.
        geometry: of the model, for the step times that are predicted before any was measured.
        hash_key: of block hashes, the same in a whole server so that its router can look prompts up; drawn here if
            empty.
        store: what the last worker of this kind had learned of its step times.

    Raises:
        ConfigError: for an unknown policy or a log that cannot be written.
    """
    policy = make_policy(config.scheduler)
    recorder = None if config.step_log is None else StepRecorder(step_log_path(config, name))
    core = EngineCore(
        executor,
        policy,
        ready_model(executor, config, prior_of(executor.spec, geometry), store),
        clock=clock,
        max_running=config.max_running,
        max_waiting=config.max_waiting,
        prefix_caching=config.prefix_caching,
        hash_key=hash_key or os.urandom(16),
        name=name,
    )
    if recorder is not None:
        core.on_step = recorder.write
    core.publish(force=True)
    give_back_freed()
    return core


def ready_model(executor: Executor, config: EngineConfig, prior: Prior, store: ModelStore | None) -> PerformanceModel:
    """The performance model of a worker that begins to serve: calibrated if the settings ask for it, and resumed."""
    model, measured = make_model(config.performance_model, prior), []
    if config.calibrate and not executor.spec.device.startswith("emulated"):
        measured = calibrate(executor, model, max_running=config.max_running)
        log.debug("calibrated with %d steps", len(measured))
    remembered = store.load() if store is not None and isinstance(model, OnlineModel) else None
    return model if remembered is None else resumed(remembered, prior, measured) or model


def store_of(config: EngineConfig, spec: ExecutorSpec, geometry: ModelConfig | None) -> ModelStore | None:
    """Where a worker keeps what it learns; None if it keeps nothing: by its settings, or on an emulated device.

    Raises:
        ConfigError: as `folder_of`.
    """
    folder = folder_of(config.step_times)
    if folder is None or spec.device.startswith("emulated"):
        return None
    return ModelStore(folder, kind_of(spec, geometry, prior_of(spec, geometry), eager=config.enforce_eager))


def info_of(core: EngineCore, info: WorkerInfo) -> WorkerInfo:
    """The info of a worker once its core is made."""
    spec = core.executor.spec
    return msgspec.structs.replace(
        info,
        dtype=spec.dtype,
        attention_backend=spec.attention_backend,
        max_model_len=core.max_model_len,
        max_batch_tokens=spec.max_batch_tokens,
        block_size=spec.block_size,
        kv_total_blocks=core.kv.total_blocks,
        weights_bytes=spec.weights_bytes,
        kv_bytes=spec.kv_bytes,
        scheduler=core.scheduler.policy.name,
        max_waiting=core.scheduler.max_waiting,
        traits=core.scheduler.policy.traits,
        max_running=core.scheduler.max_running,
    )


def step_log_path(config: EngineConfig, name: str) -> Path:
    """The file of one worker: its name is put before the suffixes where there are several."""
    assert config.step_log is not None
    path = Path(config.step_log)
    if len(parse_devices(config.devices)) == 1:
        return path
    stem, dot, suffixes = path.name.partition(".")
    return path.with_name(f"{stem}.{name}{dot}{suffixes}")
