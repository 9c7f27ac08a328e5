"""The phase that compiles our Triton kernels in many processes, so that those after it find them in Triton's cache.

Each process launches what it is given on a little data, so that what is compiled is what will be launched.
"""

from __future__ import annotations

import concurrent.futures
import dataclasses
import multiprocessing
import os
import time
from collections.abc import Callable

import torch

from gpu_phases.attention import SHAPES, row_kinds, run_rows, usable
from gpu_phases.common import (
    LARGE,
    SMALL,
    TINY,
    Cases,
    Findings,
    Setting,
    Skip,
    make_executor,
    prompts_for,
    serve,
    unheard,
)
from nexusengine.attention.base import FP8
from nexusengine.layers.triton_ops import TritonOps
from nexusengine.loading.fp8 import Fp8Weight
from nexusengine.model_config import ModelConfig
from nexusengine.sampling.sampler import sample
from nexusengine.sampling.table import SamplingTable
from nexusengine.triton_kernels import fp8, launch
from nexusengine.types import SamplingParams

_MOST_PROCESSES = 14
_FEW_TOKENS = 16_384
"""A vocabulary of this size launches the kernels of any that is a multiple of 16."""


def precompile(at: Setting) -> Findings:
    """Seconds that each part took to compile and to run once."""
    if at.device.type != "cuda":
        raise Skip("nothing is compiled for a CPU")
    parts, quiet = jobs(at), dataclasses.replace(at, tell=unheard)
    cases = Cases(at)
    processes = min(_MOST_PROCESSES, len(parts), max((os.cpu_count() or 2) - 1, 1))
    fork = multiprocessing.get_context("fork")  # of a process that has not touched CUDA
    with concurrent.futures.ProcessPoolExecutor(processes, fork) as pool:
        futures = {name: pool.submit(_timed, quiet, name) for name in parts}
        for name, future in futures.items():
            cases.run(name, future.result)
    return cases.end()


def jobs(at: Setting) -> dict[str, Callable[[], object]]:
    """What is to be launched, by name; the longest first."""
    found: dict[str, Callable[[], object]] = {}
    for shape in SHAPES:
        for kept in (None, FP8):
            name = f"attention {shape[0]}/{shape[1]}x{shape[2]}{' 8-bit K and V' if kept else ''}"
            for part, rows in enumerate(([0, 1], [2, 3])):  # decodes and longer queries are other kernels
                found[f"{name}, {('decodes', 'prompts')[part]}"] = lambda s=shape, k=kept, r=rows: _attention(
                    at, s, k, r
                )  # type: ignore[misc]
    for name, config, dtype in (
        ("8B", LARGE, "bfloat16"), ("0.6B", SMALL, "bfloat16"), ("0.6B", SMALL, "float32"), ("tiny", TINY, "float32"),
        ("tiny", TINY, "bfloat16"),
    ):  # fmt: skip
        found[f"model {name} {dtype}"] = lambda c=config, d=dtype: _model(at, c, d)  # type: ignore[misc]
    found["8-bit products"] = lambda: _eight_bits(at)
    found["sampling"] = lambda: _sampling(at)
    return found


def _timed(at: Setting, name: str) -> float:
    began_s = time.perf_counter()
    with torch.inference_mode():
        jobs(at)[name]()
        at.sync()
    return round(time.perf_counter() - began_s, 2)


def _attention(at: Setting, shape: tuple[int, int, int], kept: torch.dtype | None, kinds: list[int]) -> None:
    spec = usable(at, "triton", shape, kept)
    every = row_kinds(spec.block_size)
    for kind in kinds:
        run_rows(at, "triton", spec, every[kind])


def _model(at: Setting, config: ModelConfig, dtype: str) -> None:
    """One layer of it: the kernels of a layer are those of all."""
    vocabulary = min(config.vocab_size, _FEW_TOKENS)
    small = dataclasses.replace(config, num_layers=1, vocab_size=vocabulary)
    executor = make_executor(
        at, small, dtype, attention_backend="triton", kv_cache_bytes=2**24, max_model_len=512, enforce_eager=True
    )
    serve(executor, prompts_for(small, 3, 30), 4)
    executor.close()


def _eight_bits(at: Setting) -> None:
    available = at.device.type == "cpu" or launch.capability(at.device) >= launch.FP8_CAPABILITY
    if not available:
        raise Skip("8-bit floats need compute capability 8.9")
    generator, ops, block = at.generator(), TritonOps(1e-5, fp8=True), fp8.BLOCK
    sizes = [(2 * block, block)] if at.device.type == "cpu" else [(4096, 4096), (4096, 14_336)]
    for outputs, inputs in sizes:
        data = torch.zeros(outputs, inputs, device=at.device).to(FP8)
        scales = torch.ones(outputs // block, inputs // block, device=at.device)
        product = ops.pack(Fp8Weight(data, scales, (block, block)))
        for tokens in (1, 17):
            x = torch.randn(tokens, inputs, device=at.device, generator=generator).to(at.dtype)
            product(x)
            fp8.quantize(x)


def _sampling(at: Setting) -> None:
    table = SamplingTable.empty(2)
    for slot in range(2):
        table.set(slot, SamplingParams(temperature=float(slot), top_p=0.9, top_k=5, seed=slot))
    rows = table.rows(*(torch.arange(2, dtype=torch.int32).numpy() for _ in range(2)))
    sample(torch.zeros(2, 512, device=at.device), rows)
