"""The contract of every executor (contract 3 of the architecture). No torch here."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Protocol

from nexusengine.config import Quantization
from nexusengine.execute.batch import StepBatch, StepResult

Progress = Callable[[str, float], None]
"""Called with (phase, fraction 0..1) while an executor is made, e.g. ("loading weights", 0.4)."""


@dataclass(frozen=True, slots=True)
class ExecutorSpec:
    """Limits and properties of an executor, fixed when it is made.

    Attributes:
        num_blocks: KV blocks, with the null block 0.
        max_model_len: longest sequence in tokens, prompt and output together.
        attention_backend: its name.
        device_name: what its maker calls the device, where that is known.
        overlaps: a second step can be submitted while one is in flight.
        kv_dtype: of the KV cache; "" if it is `dtype`.
        ready_blocks: so many blocks, the first ones, have memory from the start; 0: all of them.
    """

    device: str
    dtype: str
    block_size: int
    num_blocks: int
    max_model_len: int
    max_batch_tokens: int
    vocab_size: int
    attention_backend: str
    weights_bytes: int
    kv_bytes: int
    device_name: str = ""
    overlaps: bool = False
    kv_dtype: str = ""
    ready_blocks: int = 0


@dataclass(frozen=True, slots=True)
class ExecutorOptions:
    """The user's decisions about an executor; None: chosen from model and device.

    Attributes:
        kv_cache_bytes: memory for K and V.
        fp8_kv: keep K and V as 8-bit floats.
        block_size: tokens a block.
        max_batch_tokens: most tokens in a step.
        max_running: most sequences in a step.
        worker: its name, so that emulated devices do not all scatter alike.
        overlap: take a second step while one is in flight; by default where the device works beside the host.
        enforce_eager: no CUDA graphs.
    """

    dtype: str | None = None
    quantization: Quantization = "none"
    max_model_len: int | None = None
    kv_cache_bytes: int | None = None
    fp8_kv: bool = False
    block_size: int | None = None
    max_batch_tokens: int = 2048
    max_running: int = 256
    attention_backend: str | None = None
    seed: int = 0
    worker: str = ""
    overlap: bool | None = None
    enforce_eager: bool = False


class Executor(Protocol):
    """Computes steps, one at a time, in the order they were submitted.

    `submit` may return before the device is done; `collect` waits for it.
    """

    spec: ExecutorSpec

    def submit(self, batch: StepBatch) -> None:
        """Start a step; the batch's arrays may be reused once this returns.

        At most one step is in flight, or two where steps overlap.
        """
        ...

    def collect(self) -> StepResult:
        """The result of the oldest step in flight."""
        ...

    def close(self) -> None:
        """Free the device's memory. Safe to call twice."""
        ...
