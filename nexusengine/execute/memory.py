"""How many KV blocks a device holds, and how long a sequence may get."""

from __future__ import annotations

from pathlib import Path

from nexusengine.errors import ConfigError
from nexusengine.execute.base import ExecutorOptions
from nexusengine.model_config import ModelConfig

_CPU_SHARE, _CPU_MOST_BYTES = 0.4, 4 * 2**30


def cpu_kv_bytes() -> int:
    """A share of the memory that is available now, at most 4 GiB."""
    for line in Path("/proc/meminfo").read_text().splitlines():
        if line.startswith("MemAvailable:"):
            return min(int(int(line.split()[1]) * 1024 * _CPU_SHARE), _CPU_MOST_BYTES)
    raise ConfigError("cannot tell how much memory is free; give --kv-cache-memory", param="kv_cache_memory")


def size_kv(
    config: ModelConfig, options: ExecutorOptions, kv_bytes: int, block_size: int, element_bytes: int
) -> tuple[int, int]:
    """(blocks with the null block, longest sequence in tokens) for `kv_bytes` of KV cache.

    No more blocks than `max_running` sequences of full length can use. Raises ConfigError with the numbers.
    """
    if options.max_model_len is not None and options.max_model_len > config.max_position:
        raise ConfigError(
            f"max_model_len {options.max_model_len} is more than the model's {config.max_position} positions",
            param="max_model_len",
        )
    block_bytes = config.kv_bytes_per_token(element_bytes) * block_size
    wanted_len = options.max_model_len or config.max_position
    useful = options.max_running * -(-wanted_len // block_size)
    usable = min(kv_bytes // block_bytes - 1, useful)
    if usable < 1:
        raise ConfigError(
            f"a KV cache of {kv_bytes} bytes holds no block of {block_size} tokens: each takes {block_bytes} bytes, "
            "and one is set aside; raise --kv-cache-memory",
            param="kv_cache_memory",
        )
    if options.max_model_len is not None and usable * block_size < options.max_model_len:
        needed = (-(-options.max_model_len // block_size) + 1) * block_bytes
        raise ConfigError(
            f"max_model_len {options.max_model_len} needs {needed} bytes of KV cache, there are {kv_bytes}; lower it "
            "or raise --kv-cache-memory",
            param="kv_cache_memory",
        )
    return usable + 1, min(wanted_len, usable * block_size)
