"""How a device's memory is divided: how many KV blocks it holds, and how long a sequence may get. No torch."""

from __future__ import annotations

import ctypes
import os
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from nexusengine.cgroup import limits
from nexusengine.config import DeviceSpec
from nexusengine.errors import ConfigError
from nexusengine.execute.base import ExecutorOptions
from nexusengine.execute.batch import StepBatch
from nexusengine.model_config import ModelConfig
from nexusengine.sampling.table import SamplingTable
from nexusengine.types import MAX_LOGPROBS, SamplingParams

_CPU_SHARE, _CPU_MOST_BYTES = 0.4, 4 * 2**30
_READY_BYTES = 256 * 2**20
_GRAPHS_SHARE, _GRAPHS_MOST_BYTES = 1 / 32, 2 * 2**30
RESERVE_SHARE = 0.1
"""Of a GPU's memory, left for fragmentation and whatever else uses the device."""


@dataclass(frozen=True, slots=True)
class DeviceMemory:
    """A device's memory in bytes, once the model's weights are there.

    Attributes:
        total: all of it; of a CPU, what this process can have without swapping.
        weights: the model's.
        free: the most that a KV cache can have.
        default_kv: what the KV cache gets if the user names no size.
        activations: measured peak of the largest step beyond the weights; on a CPU it is not measured: 0.
        graphs: set aside for CUDA graphs.
        reserve: left alone.
    """

    total: int
    weights: int
    free: int
    default_kv: int
    activations: int = 0
    graphs: int = 0
    reserve: int = 0


@dataclass(frozen=True, slots=True)
class MemoryPlan:
    """The division of a device's memory.

    Attributes:
        memory: what there is.
        kv: bytes of the KV cache.
        num_blocks: KV blocks, with the null block.
        max_model_len: longest sequence in tokens.
    """

    memory: DeviceMemory
    kv: int
    num_blocks: int
    max_model_len: int

    def parts(self) -> dict[str, int]:
        """Bytes by use, `unused` among them; together they are the total. unused < 0: the parts are more than that."""
        m = self.memory
        used = {
            "weights": m.weights,
            "activations": m.activations,
            "graphs": m.graphs,
            "kv": self.kv,
            "reserve": m.reserve,
        }
        return {**used, "unused": m.total - sum(used.values())}

    def text(self) -> str:
        """One line in GiB, for the log."""
        parts = ", ".join(f"{name} {size / 2**30:.2f}" for name, size in self.parts().items())
        return f"{self.memory.total / 2**30:.2f} GiB: {parts}"


def graph_budget_bytes(total_bytes: int) -> int:
    """A thirty-second of the device, at most 2 GiB."""
    return min(int(total_bytes * _GRAPHS_SHARE), _GRAPHS_MOST_BYTES)


def available_bytes(root: Path = Path("/")) -> int:
    """Memory that this process can have without swapping: what the host has free and its control groups leave.

    Args:
        root: where /proc and /sys are.

    Raises:
        ConfigError: the system does not say.
    """
    try:
        lines = (root / "proc/meminfo").read_text().splitlines()
    except OSError:
        lines = []
    left = limits(root).free_bytes
    for line in lines:
        if line.startswith("MemAvailable:"):
            free = int(line.split()[1]) * 1024
            return free if left is None else min(free, left)
    raise ConfigError("cannot tell how much memory is free; give --kv-cache-memory", param="kv_cache_memory")


def resident_bytes() -> int:
    """Memory of this process that is in RAM, with the file pages it has mapped; 0 where the system does not say."""
    try:
        return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")
    except OSError:
        return 0


def give_back_freed() -> None:
    """Return freed memory to the system, as far as the C library can tell; loading frees many copies."""
    trim = getattr(ctypes.CDLL(None), "malloc_trim", None)
    if trim is not None:
        trim(0)


def cpu_kv_bytes() -> int:
    """A share of the memory that is available now, at most 4 GiB."""
    return min(int(available_bytes() * _CPU_SHARE), _CPU_MOST_BYTES)


def cpu_memory(weights_bytes: int) -> DeviceMemory:
    """The memory of this process, which holds the weights already.

    Raises:
        ConfigError: the system does not say how much is free.
    """
    free = available_bytes()
    return DeviceMemory(free + weights_bytes, weights_bytes, free, cpu_kv_bytes())


def ready_blocks(num_blocks: int, block_bytes: int) -> int:
    """Number of blocks of a KV cache on a CPU that are to have memory when the engine starts, the first ones.

    Else their memory comes page by page while the first steps write there, and these take longer than all others.
    """
    return min(num_blocks, _READY_BYTES // block_bytes)


def wanted_length(config: ModelConfig, options: ExecutorOptions) -> int:
    """The longest sequence asked for, in tokens.

    Raises:
        ConfigError: the model has fewer positions.
    """
    if options.max_model_len is not None and options.max_model_len > config.max_position:
        raise ConfigError(
            f"max_model_len {options.max_model_len} is more than the model's {config.max_position} positions; set it "
            f"to {config.longest} or less",
            param="max_model_len",
        )
    if options.max_model_len is not None and options.max_model_len > config.longest:
        raise ConfigError(
            f"max_model_len {options.max_model_len} is more than the model's sliding window of {config.sliding_window} "
            f"tokens, and sliding-window attention is not supported; set it to {config.longest} or less",
            param="max_model_len",
        )
    return options.max_model_len or config.longest


def size_kv(
    config: ModelConfig, options: ExecutorOptions, kv_bytes: int, block_size: int, element_bytes: int
) -> tuple[int, int]:
    """Size a KV cache of `kv_bytes`; no more blocks than `max_running` sequences of full length can use.

    Returns:
        Blocks with the null block, and the longest sequence in tokens.

    Raises:
        ConfigError: too little memory, with the numbers.
    """
    wanted_len = wanted_length(config, options)
    block_bytes = config.kv_bytes_per_token(element_bytes) * block_size
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


def plan_memory(
    config: ModelConfig,
    options: ExecutorOptions,
    device: DeviceSpec,
    memory: DeviceMemory,
    block_size: int,
    element_bytes: int,
) -> MemoryPlan:
    """Size the KV cache by what the user asked for, or by what the device has for it.

    Args:
        config: of the model.
        options: what the user decided.
        device: its name, for errors.
        memory: of the device.
        block_size: tokens a block.
        element_bytes: bytes of a number in the KV cache.

    Raises:
        ConfigError: the device holds too little, with the numbers.
    """
    kv_bytes = options.kv_cache_bytes or memory.default_kv
    num_blocks, max_model_len = size_kv(config, options, kv_bytes, block_size, element_bytes)
    needed = num_blocks * block_size * config.kv_bytes_per_token(element_bytes)
    if needed > memory.free:
        raise ConfigError(
            f"a KV cache of {needed} bytes was asked for, but only {memory.free} bytes are free on {device}; "
            "lower --kv-cache-memory",
            param="kv_cache_memory",
        )
    return MemoryPlan(memory, needed, num_blocks, max_model_len)


def largest_step(options: ExecutorOptions, longest: int, block_size: int) -> StepBatch:
    """A step that takes about as much memory as any.

    It has most rows, most tokens and the longest context, and every row is sampled with filters and log-probabilities.
    All its blocks are block 1, so a KV cache of two blocks can run it.
    """
    rows = min(options.max_running, options.max_batch_tokens)
    chunk = min(options.max_batch_tokens - rows + 1, longest)
    counts = np.ones(rows, np.int32)
    starts = np.zeros(rows, np.int32)
    counts[-1], starts[-1] = chunk, longest - chunk
    sampling = SamplingTable.empty(rows)
    for slot in range(rows):
        sampling.set(slot, SamplingParams(temperature=1.0, top_p=0.9, seed=slot, logprobs=MAX_LOGPROBS))
    return StepBatch(
        slots=np.arange(rows, dtype=np.int32),
        starts=starts,
        counts=counts,
        sampled=np.ones(rows, np.bool_),
        token_ids=np.zeros(int(counts.sum()), np.int32),
        block_tables=np.ones((rows, -(-longest // block_size)), np.int32),
        sampling=sampling,
    )
