"""What the phases of gpu_check.py share: where they run, the shapes, an executor, and answers of a whole engine."""

from __future__ import annotations

import dataclasses
import time
import traceback
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


_REPEATS = 10
"""Of what is timed, in one graph, so that starting the graph does not show."""


class Skip(Exception):
    """The phase or case cannot run here; the message says why."""


class CasesFailed(Exception):
    """Some cases of a phase failed: found has them all, trace is where the first one did."""

    def __init__(self, message: str, found: Findings, trace: str) -> None:
        super().__init__(message)
        self.found, self.trace = found, trace


def unheard(found: Findings) -> None:
    """Where nobody asks what was found so far."""


@dataclasses.dataclass(frozen=True)
class Setting:
    """Where a phase runs.

    Attributes:
        beside: the file of findings; what else a phase writes goes beside it.
        ends_s: on time.monotonic: when the phase should come to its end.
        tell: takes what was found so far, in case the phase does not end.
    """

    device: torch.device
    tiny: bool
    beside: Path | None = None
    ends_s: float = float("inf")
    tell: Callable[[Findings], None] = unheard

    @property
    def late(self) -> bool:
        return time.monotonic() > self.ends_s

    @property
    def dtype(self) -> torch.dtype:
        return torch.bfloat16 if self.device.type == "cuda" else torch.float32

    def sync(self) -> None:
        if self.device.type == "cuda":
            torch.cuda.synchronize()

    def generator(self) -> torch.Generator:
        """Of test data, which is made where it is needed."""
        return torch.Generator(self.device).manual_seed(0)

    def host_seconds(self, run: Callable[[], object], runs: int = 10) -> float:
        """Median of `runs` by the host's clock, launches included, after two to warm up."""
        took = []
        for i in range(runs + 2):
            self.sync()
            began = time.perf_counter()
            run()
            self.sync()
            if i > 1:
                took.append(time.perf_counter() - began)
        return float(np.median(took))

    def seconds(self, run: Callable[[], object], runs: int = 10) -> float:
        """Median of `runs` on the device: on CUDA of a graph of it, so that launching it does not show.

        Args:
            run: what a graph can capture.
            runs: replays.
        """
        if self.device.type != "cuda":
            return self.host_seconds(run, runs)
        stream = torch.cuda.Stream(self.device)
        stream.wait_stream(torch.cuda.current_stream(self.device))
        with torch.cuda.stream(stream):
            run()
        torch.cuda.synchronize(self.device)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph, stream=stream):
            for _ in range(_REPEATS):
                run()
        took = []
        for i in range(runs + 2):
            began, ended = (torch.Event("cuda", enable_timing=True) for _ in range(2))
            began.record()
            graph.replay()
            ended.record()
            ended.synchronize()
            if i > 1:
                took.append(began.elapsed_time(ended) / 1000 / _REPEATS)
        return float(np.median(took))

    def copy_gb_s(self) -> float:
        """GB/s that the device copies, read and written, measured now: shares of bandwidth are shares of this."""
        n = 2**20 if self.tiny else 2**30
        a, b = (torch.zeros(n, dtype=torch.uint8, device=self.device) for _ in range(2))
        return 2 * n / self.seconds(lambda: b.copy_(a)) / 1e9

    def read_gb_s(self) -> float:
        """GB/s that the device reads in a sum."""
        n = 2**18 if self.tiny else 2**28
        a = torch.zeros(n, dtype=torch.float32, device=self.device)
        return 4 * n / self.seconds(a.sum) / 1e9


class Cases:
    """The cases of a phase: one that fails is recorded, and the others go on."""

    def __init__(self, at: Setting) -> None:
        self._at = at
        self.found: Findings = {}
        self._failed: list[str] = []
        self._trace = ""

    def run(self, name: str, case: Callable[[], object]) -> None:
        """Run a case unless the phase is out of time; what it returns is its finding."""
        if self._at.late:
            self.found[name] = "skipped: out of time"
            return
        try:
            self.found[name] = case()
        except Skip as reason:
            self.found[name] = f"skipped: {reason}"
        except Exception as error:  # recorded, and raised by `end`
            words = str(error) if isinstance(error, AssertionError) else f"{type(error).__name__}: {error}"
            self.found[name] = f"failed: {words}"
            self._failed.append(name)
            self._trace = self._trace or traceback.format_exc()
        self._at.tell(self.found)

    def end(self) -> Findings:
        """What was found.

        Raises:
            CasesFailed: a case failed.
        """
        if self._failed:
            first = self._failed[0]
            message = f"{len(self._failed)} of {len(self.found)} cases failed; {first}: {self.found[first]}"
            raise CasesFailed(message, self.found, self._trace)
        return self.found


def bytes_read(config: ModelConfig, weights_bytes: int, element_bytes: int) -> int:
    """Bytes of weights that a decode step reads: all but the table of embeddings, unless that is the head too."""
    table = 0 if config.tie_embeddings else config.vocab_size * config.hidden_size * element_bytes
    return weights_bytes - table


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
    """Greedy answers, the core, and the instants of each request's first token."""
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
