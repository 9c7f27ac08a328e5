"""From settings to an engine core: the one place where executor, policy and performance model come together."""

from __future__ import annotations

import os

from nexusengine.clock import Clock
from nexusengine.config import EngineConfig
from nexusengine.core.core import EngineCore
from nexusengine.execute.base import Executor, ExecutorOptions
from nexusengine.lens.registry import make_policy
from nexusengine.perf.linear import LinearModel


def executor_options(config: EngineConfig) -> ExecutorOptions:
    return ExecutorOptions(
        dtype=None if config.dtype == "auto" else config.dtype,
        max_model_len=config.max_model_len,
        kv_cache_bytes=config.kv_cache_memory,
        block_size=config.block_size,
        max_batch_tokens=config.max_batch_tokens,
        max_running=config.max_running,
        attention_backend=config.attention_backend,
        seed=config.seed,
    )


def make_core(
    executor: Executor, config: EngineConfig, clock: Clock, name: str = "w0", hash_key: bytes = b""
) -> EngineCore:
    """name: the worker's. hash_key: of the names of KV blocks, the same in a whole server so that its router can look
    prompts up; drawn here if there is none. Raises ConfigError for an unknown policy."""
    return EngineCore(
        executor,
        make_policy(config.scheduler),
        LinearModel(),
        clock=clock,
        max_running=config.max_running,
        max_waiting=config.max_waiting,
        prefix_caching=config.prefix_caching,
        hash_key=hash_key or os.urandom(16),
        name=name,
    )
