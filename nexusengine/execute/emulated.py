"""A device that is not there: real time, real KV accounting, made-up tokens.

`emulated:PROFILE` takes as long for each step as the device of a profile does (see nexusengine.profiles), scattered as
measured, and holds as many KV tokens. `emulated:h100` is h100/llama-3.1-8b whatever model's tokenizer is served;
`emulated:h100/qwen3-32b` names another, `emulated:my.json` a file. `emulated:instant` takes no time.
"""

from __future__ import annotations

import dataclasses
import time
import zlib
from collections import deque

import numpy as np
import numpy.typing as npt

from nexusengine.config import DeviceSpec
from nexusengine.errors import ConfigError
from nexusengine.execute.base import ExecutorOptions, ExecutorSpec, Progress
from nexusengine.execute.batch import StepBatch, StepResult
from nexusengine.execute.memory import size_kv
from nexusengine.loading.resolve import ModelFiles
from nexusengine.model_config import ModelConfig
from nexusengine.profiles.base import DeviceProfile
from nexusengine.profiles.registry import load_profile
from nexusengine.splitmix import GOLDEN
from nexusengine.tokenize.load import end_ids

_ELEMENT_BYTES = 2
_INSTANT = "instant"
_INSTANT_KV_BYTES = 2**30
_FOLLOWS_WITHIN_S = 0.02
_MOST_LATE_S = 0.05
_GOLDEN, _MIX, _31, _33 = np.uint64(GOLDEN), np.uint64(0xBF58476D1CE4E5B9), np.uint64(31), np.uint64(33)


class EmulatedExecutor:
    """An executor that takes the time of a profile's device for each step, and makes up tokens.

    Args:
        config: of the model.
        profile: None is the instant device.
        spec: what it pretends to hold.
        rng: of the scatter of step durations.
    """

    def __init__(
        self, config: ModelConfig, profile: DeviceProfile | None, spec: ExecutorSpec, rng: np.random.Generator
    ) -> None:
        self.spec = spec
        self._profile, self._rng = profile, rng
        self._in_flight: deque[tuple[StepResult, float]] = deque()  # what it computes, and when it ends
        self._ended_s, self._late_s = float("-inf"), 0.0
        first = min(max((*config.eos_token_ids, config.bos_token_id or 0)) + 1, config.vocab_size - 1)
        self._first_token, self._made_up = np.int32(first), np.uint64(spec.vocab_size - first)

    @classmethod
    def create(
        cls, files: ModelFiles, device: DeviceSpec, options: ExecutorOptions, progress: Progress
    ) -> EmulatedExecutor:
        """Emulate the device that `device` names.

        Raises:
            ConfigError: the profile is unknown, or holds too little memory.
        """
        config, name = files.config, device.profile or ""
        block_size = options.block_size or 16
        kv_element_bytes = 1 if options.fp8_kv else _ELEMENT_BYTES
        token_bytes = config.kv_bytes_per_token(kv_element_bytes)
        profile: DeviceProfile | None = None
        kv_bytes, weights_bytes = _INSTANT_KV_BYTES, config.num_parameters * _ELEMENT_BYTES
        if name != _INSTANT:
            try:
                profile = load_profile(name)
            except ConfigError as error:
                raise ConfigError(f"{device}: {error.message}; also: {_INSTANT}", param="devices") from None
            kv_bytes = (profile.identity.kv_capacity_tokens + block_size) * config.kv_bytes_per_token(_ELEMENT_BYTES)
            weights_bytes = profile.identity.weights_bytes
        num_blocks, max_len = size_kv(config, options, options.kv_cache_bytes or kv_bytes, block_size, kv_element_bytes)
        progress("ready", 1.0)
        spec = ExecutorSpec(
            device=str(device),
            dtype="bfloat16",
            block_size=block_size,
            num_blocks=num_blocks,
            max_model_len=max_len,
            max_batch_tokens=options.max_batch_tokens,
            vocab_size=config.vocab_size,
            attention_backend="emulated",
            weights_bytes=weights_bytes,
            kv_bytes=num_blocks * block_size * token_bytes,
            kv_dtype="float8_e4m3fn" if options.fp8_kv else "",
            overlaps=bool(options.overlap),
        )
        seed = (options.seed, zlib.crc32(f"{options.worker} {device}".encode()))
        config = dataclasses.replace(config, eos_token_ids=end_ids(files))  # which it never makes up
        return cls(config, profile, spec, np.random.default_rng(seed))

    def step_s(self, batch: StepBatch) -> float:
        """Mean seconds of a step, without scatter."""
        return 0.0 if self._profile is None else self._profile.step_s(batch.counts, batch.starts)

    def submit(self, batch: StepBatch) -> None:
        if len(self._in_flight) > self.spec.overlaps:
            raise RuntimeError(f"steps in flight: {len(self._in_flight)}; collect it first")
        now = time.monotonic()
        late_s = self._late_s if now - self._ended_s < _FOLLOWS_WITHIN_S else 0.0
        takes_s = self.step_s(batch)
        if self._profile is not None:
            takes_s *= float(self._profile.noise(self._rng.random(1), len(batch.token_ids) > len(batch.counts))[0])
        begins_s = self._in_flight[-1][1] if self._in_flight else now - late_s
        self._in_flight.append((StepResult(self._tokens(batch), takes_s), max(begins_s, now - late_s) + takes_s))

    def collect(self) -> StepResult:
        """Sleep until the step would be over.

        A sleep ends late, by a tenth of a millisecond or more where the machine is busy; the step that follows at once
        is as much shorter, so that lateness does not add up.
        """
        if not self._in_flight:
            raise RuntimeError("no step is in flight")
        result, ends_s = self._in_flight.popleft()
        left_s = ends_s - time.monotonic()
        if left_s > 0.0:
            time.sleep(left_s)
        self._ended_s = time.monotonic()
        late_s = self._ended_s - ends_s if self._profile is not None else 0.0
        self._late_s = min(max(late_s, 0.0), _MOST_LATE_S)
        return result

    def _tokens(self, batch: StepBatch) -> npt.NDArray[np.int32]:
        """Made up of seed and position, so that a request gets the same ones on every device."""
        slots, places = batch.slots, batch.starts + batch.counts
        if np.count_nonzero(batch.sampled) < len(slots):
            slots, places = slots[batch.sampled], places[batch.sampled]
        mixed = batch.sampling.seed[slots].astype(np.uint64)
        mixed *= _GOLDEN
        mixed += places.astype(np.uint64)
        mixed ^= mixed >> _31
        mixed *= _MIX
        mixed >>= _33
        mixed %= self._made_up
        return mixed.astype(np.int32) + self._first_token

    def close(self) -> None:
        self._in_flight.clear()
