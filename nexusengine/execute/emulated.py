"""A device that is not there: real time, real KV accounting, made-up tokens.

The duration of a step is a roofline over datasheet figures with stated efficiencies, NOT a measurement; it exists so
that schedulers, router and processes can be exercised on one small machine. `emulated:instant` takes no time.
"""

from __future__ import annotations

import time

import numpy as np

from nexusengine.config import DeviceSpec
from nexusengine.errors import ConfigError
from nexusengine.execute.base import ExecutorOptions, ExecutorSpec, Progress
from nexusengine.execute.batch import StepBatch, StepResult
from nexusengine.execute.memory import size_kv
from nexusengine.loading.resolve import ModelFiles
from nexusengine.model_config import ModelConfig
from nexusengine.perf.devices import DATASHEETS, Datasheet

_COMPUTE_EFFICIENCY, _BANDWIDTH_EFFICIENCY = 0.6, 0.8
_OVERHEAD_S = 0.002
_ELEMENT_BYTES = 2
_MEMORY_SHARE = 0.9
_INSTANT = "instant"
_INSTANT_KV_BYTES = 2**30


class EmulatedExecutor:
    """`datasheet` None is the instant device."""

    def __init__(self, config: ModelConfig, datasheet: Datasheet | None, spec: ExecutorSpec) -> None:
        self.spec = spec
        self._config, self._datasheet = config, datasheet
        self._in_flight: tuple[StepBatch, float, float] | None = None
        self._first_token = min(max((*config.eos_token_ids, config.bos_token_id or 0)) + 1, config.vocab_size - 1)

    @classmethod
    def create(
        cls, files: ModelFiles, device: DeviceSpec, options: ExecutorOptions, progress: Progress
    ) -> EmulatedExecutor:
        """Raises ConfigError for an unknown profile or a model that does not fit the device."""
        profile = device.profile or ""
        if profile != _INSTANT and profile not in DATASHEETS:
            raise ConfigError(
                f"unknown device profile {profile!r}; known: {', '.join([*DATASHEETS, _INSTANT])}", param="devices"
            )
        config, datasheet = files.config, DATASHEETS.get(profile)
        weights_bytes = config.num_parameters * _ELEMENT_BYTES
        room = int(datasheet.memory_gb * 1e9 * _MEMORY_SHARE) - weights_bytes if datasheet else _INSTANT_KV_BYTES
        block_size = options.block_size or 16
        num_blocks, max_len = size_kv(config, options, options.kv_cache_bytes or room, block_size, _ELEMENT_BYTES)
        progress("ready", 1.0)
        return cls(
            config,
            datasheet,
            ExecutorSpec(
                device=str(device),
                dtype="bfloat16",
                block_size=block_size,
                num_blocks=num_blocks,
                max_model_len=max_len,
                max_batch_tokens=options.max_batch_tokens,
                vocab_size=config.vocab_size,
                attention_backend="emulated",
                weights_bytes=weights_bytes,
                kv_bytes=num_blocks * block_size * config.kv_bytes_per_token(_ELEMENT_BYTES),
            ),
        )

    def step_s(self, batch: StepBatch) -> float:
        """Seconds: the larger of moving weights and KV, and of computing, plus a fixed overhead."""
        if self._datasheet is None:
            return 0.0
        c, q, ctx = self._config, batch.counts.astype(np.float64), batch.starts.astype(np.float64)
        pairs = float((q * (ctx + 0.5 * q)).sum())
        flops = 2.0 * c.num_parameters * q.sum() + 4.0 * c.num_layers * c.num_heads * c.head_dim * pairs
        moved = _ELEMENT_BYTES * c.num_parameters + (ctx + q).sum() * c.kv_bytes_per_token(_ELEMENT_BYTES)
        compute_s = flops / (self._datasheet.tflops * 1e12 * _COMPUTE_EFFICIENCY)
        memory_s = moved / (self._datasheet.bandwidth_gb_s * 1e9 * _BANDWIDTH_EFFICIENCY)
        return float(max(compute_s, memory_s)) + _OVERHEAD_S

    def submit(self, batch: StepBatch) -> None:
        if self._in_flight is not None:
            raise RuntimeError("a step is in flight; collect it first")
        self._in_flight = (batch, time.monotonic(), self.step_s(batch))

    def collect(self) -> StepResult:
        """Sleeps until the step would be over."""
        if self._in_flight is None:
            raise RuntimeError("no step is in flight")
        batch, began_s, takes_s = self._in_flight
        self._in_flight = None
        time.sleep(max(began_s + takes_s - time.monotonic(), 0.0))
        slots = batch.slots[batch.sampled]
        positions = (batch.starts + batch.counts)[batch.sampled].astype(np.uint64)
        mixed = batch.sampling.seed[slots].astype(np.uint64) * np.uint64(0x9E3779B97F4A7C15) + positions
        mixed = (mixed ^ (mixed >> np.uint64(31))) * np.uint64(0xBF58476D1CE4E5B9)
        spread = np.uint64(self.spec.vocab_size - self._first_token)
        tokens = ((mixed >> np.uint64(33)) % spread).astype(np.int32) + np.int32(self._first_token)
        return StepResult(tokens, time.monotonic() - began_s)

    def close(self) -> None:
        self._in_flight = None
