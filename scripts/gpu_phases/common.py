"""What the phases of gpu_check.py share: where they run, the shapes, an executor, and answers of a whole engine."""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch

from nexusengine.clock import MonotonicClock
from nexusengine.config import parse_device
from nexusengine.core.engine_core import EngineCore
from nexusengine.execute.base import ExecutorOptions
from nexusengine.execute.torch_executor import TorchExecutor
from nexusengine.model_config import ModelConfig
from nexusengine.perf.registry import make_model
from nexusengine.scheduler.baselines.fcfs import FCFS
from nexusengine.types import EngineRequest, SamplingParams

TINY = ModelConfig("LlamaForCausalLM", 97, 64, 128, 2, 4, 2, 16, 512, 1e-6, 10_000.0)
SMALL = ModelConfig("LlamaForCausalLM", 151_936, 1024, 3072, 28, 16, 8, 64, 8192, 1e-6, 1_000_000.0)  # about 0.6B
LARGE = ModelConfig("LlamaForCausalLM", 128_256, 4096, 14_336, 32, 32, 8, 128, 8192, 1e-5, 500_000.0)  # Llama 3 8B's
Findings = dict[str, Any]


class Skip(Exception):
    """The phase cannot run here; the message says why."""


@dataclasses.dataclass(frozen=True)
class Setting:
    device: torch.device
    tiny: bool
    beside: Path | None = None  # the file of findings; what else a phase writes goes beside it
    ends_s: float = float("inf")  # on time.monotonic: when the phase should come to its end

    @property
    def late(self) -> bool:
        return time.monotonic() > self.ends_s

    @property
    def dtype(self) -> torch.dtype:
        return torch.bfloat16 if self.device.type == "cuda" else torch.float32

    def sync(self) -> None:
        if self.device.type == "cuda":
            torch.cuda.synchronize()

    def seconds(self, run: Callable[[], object], runs: int = 10) -> float:
        """Median of `runs`, after two to warm up."""
        took = []
        for i in range(runs + 2):
            self.sync()
            began = time.perf_counter()
            run()
            self.sync()
            if i > 1:
                took.append(time.perf_counter() - began)
        return float(np.median(took))

    def copy_gb_s(self) -> float:
        """GB/s that the device copies, read and written, measured now: shares of bandwidth are shares of this."""
        n = 2**20 if self.tiny else 2**30
        a, b = (torch.zeros(n, dtype=torch.uint8, device=self.device) for _ in range(2))
        return 2 * n / self.seconds(lambda: b.copy_(a)) / 1e9


def make_executor(at: Setting, config: ModelConfig, dtype: str, **options: Any) -> TorchExecutor:
    given = {
        "seed": 1,
        "max_running": 8,
        "max_batch_tokens": 256,
        "max_model_len": min(config.max_position, 4096),
        **options,
    }
    if at.device.type == "cpu":
        given.setdefault("kv_cache_bytes", 2**24)
    name = "cpu" if at.device.type == "cpu" else f"cuda:{at.device.index or 0}"
    return TorchExecutor.build(
        config, None, parse_device(name), ExecutorOptions(dtype=dtype, **given), lambda phase, fraction: None
    )


def serve(
    executor: TorchExecutor, prompts: list[list[int]], tokens: int, *, chunk: int = 256, cached: bool = True,
    running: int = 8,
) -> tuple[list[list[int]], EngineCore, list[float]]:  # fmt: skip
    """Greedy answers, the core, and the instants of each request's first token and end."""
    core = EngineCore(
        executor, FCFS(chunk), make_model(), clock=MonotonicClock(), max_running=running, max_waiting=len(prompts),
        prefix_caching=cached, hash_key=b"k",
    )  # fmt: skip
    for i, prompt in enumerate(prompts):
        sampling = SamplingParams(temperature=0.0, seed=0, max_tokens=tokens, ignore_eos=True)
        core.add(EngineRequest(str(i), prompt, sampling, core.clock.now()))
    answers: list[list[int]] = [[] for _ in prompts]
    first: dict[str, float] = {}
    while core.has_work:
        for delta in core.step():
            if delta.error_message:
                raise AssertionError(f"request {delta.request_id}: {delta.error_message}")
            first.setdefault(delta.request_id, time.perf_counter())
            answers[int(delta.request_id)] += delta.token_ids
    return answers, core, list(first.values())


def prompts_for(config: ModelConfig, count: int, length: int) -> list[list[int]]:
    rng = np.random.default_rng(0)
    return [rng.integers(3, config.vocab_size, max(length - 3 * i, 4)).tolist() for i in range(count)]
