"""The phases that run the whole engine: the same text in every way of running, graphs, and throughput."""

from __future__ import annotations

import dataclasses
import time
from typing import Any

import numpy as np

from gpu_phases.common import (
    LARGE,
    SMALL,
    TINY,
    Cases,
    Findings,
    Setting,
    Skip,
    bytes_read,
    make_executor,
    prompts_for,
    serve,
)
from nexusengine.attention.registry import backend_class
from nexusengine.execute.batch import StepResult
from nexusengine.execute.torch_executor import TorchExecutor
from nexusengine.model_config import ModelConfig


def variants(at: Setting) -> Findings:
    """The same greedy text in chunks, without prefix cache, preempted, without overlap, and without graphs."""
    prompts = [*prompts_for(TINY, 4, 60), *prompts_for(TINY, 2, 60)]
    block_bytes = 2 * 16 * TINY.num_kv_heads * TINY.head_dim * TINY.num_layers * 4
    small = {"kv_cache_bytes": 14 * block_bytes, "block_size": 16, "attention_backend": "sdpa"}
    plain: list[list[int]] = []

    def variant(name: str, options: dict[str, Any], serving: dict[str, Any]) -> Findings:
        executor = make_executor(at, TINY, "float32", **options)
        answers, core, _ = serve(executor, prompts, 48, **serving)
        plain[:] = plain or answers
        replays = executor.graphs.table.replays if executor.graphs else 0
        executor.close()
        if answers != plain:
            raise AssertionError("the text differs from that of the plain run")
        preemptions = core.stats().preemptions
        if name == "preempted" and not preemptions:
            raise AssertionError("no request was preempted where there were too few blocks for all")
        return {"preemptions": preemptions, "graph_replays": replays}

    cases = Cases(at)
    for name, options, serving in (
        ("plain", {"overlap": False, "enforce_eager": True}, {"cached": False}),
        ("chunks", {"overlap": False, "enforce_eager": True}, {"chunk": 17}),
        ("prefix cache", {"overlap": False, "enforce_eager": True}, {"running": 2}),
        ("preempted", {**small, "max_model_len": 128, "overlap": True}, {}),
        ("overlap", {"overlap": True, "enforce_eager": True}, {}),
        ("graphs", {"overlap": True}, {}),
    ):
        cases.run(name, lambda n=name, o=options, s=serving: variant(n, o, s))  # type: ignore[misc]
    return cases.end()


def graphs(at: Setting) -> Findings:
    """Decode steps are captured before the first step, within their budget, and replayed."""
    if at.device.type != "cuda":
        raise Skip("CUDA graphs need CUDA; their bookkeeping and padding are tested with stand-ins")
    began_s = time.perf_counter()
    executor = make_executor(at, SMALL, "bfloat16", max_running=64)
    made_s = time.perf_counter() - began_s
    backend = executor.spec.attention_backend
    if not backend_class(backend).caps().graphs:
        raise Skip(f"attention backend {backend} cannot be captured")
    if executor.graphs is None:
        raise AssertionError(f"no graph was captured with attention backend {backend}; the log has the reason")
    table = executor.graphs.table
    captured = table.captured
    serve(executor, prompts_for(SMALL, 40, 20), 24, running=40)
    found = {
        "captured": [dataclasses.asdict(s) for s in captured],
        "refused": {f"{s.rows}x{s.longest}": reason for s, reason in table.refused.items()},
        "used_bytes": table.used_bytes,
        "replays": table.replays,
        "executor_made_s": made_s,
    }
    executor.close()
    if not table.replays or table.captured != captured:
        raise AssertionError(f"steps ran as graphs: {table.replays}; captured in between: {table.captured != captured}")
    return found


def end_to_end(at: Setting) -> Findings:
    """Throughput, time to the first token and between tokens at several concurrencies.

    Also the performance model's error on the later half of the same run's steps, and the device's idleness between
    steps. All graphs are captured when the executor is made, before anything is measured.
    """
    cases, copy_gb_s = Cases(at), at.copy_gb_s()
    for shape, config in ({"tiny": TINY} if at.tiny else {"0.6B": SMALL, "8B": LARGE}).items():
        if at.late:
            cases.run(shape, lambda: None)
            continue
        executor = make_executor(
            at, config, "float32" if at.tiny else "bfloat16", max_running=4 if at.tiny else 256, max_batch_tokens=2048
        )
        idle_s = _idleness(executor)
        for users in (1, 4) if at.tiny else (1, 8, 64, 256):
            cases.run(
                f"{shape} at {users}",
                lambda e=executor, u=users, c=config, i=idle_s: _throughput(at, e, c, u, copy_gb_s, i),  # type: ignore[misc]
            )
        executor.close()
    return cases.end()


def _idleness(executor: TorchExecutor) -> list[float]:
    """Seconds that the device is idle before each step, as they come."""
    idle_s: list[float] = []
    collect = executor.collect

    def noted() -> StepResult:
        result = collect()
        idle_s.append(result.idle_s)
        return result

    executor.collect = noted  # type: ignore[method-assign]
    return idle_s


def _throughput(
    at: Setting, executor: TorchExecutor, config: ModelConfig, users: int, copy_gb_s: float, idle_s: list[float]
) -> Findings:
    most, length = (4, 24) if at.tiny else (256, 256)
    tokens = 8 if at.tiny else (128 if users < 64 else 256)
    serve(executor, prompts_for(config, users, 16), 4, running=most)  # warm
    idle_s.clear()
    began = time.perf_counter()
    answers, core, first = serve(executor, prompts_for(config, users, length), tokens, chunk=2048, running=most)
    took_s, records = time.perf_counter() - began, list(core.records)
    late = records[len(records) // 2 :]
    errors = [abs(r.predicted_s - r.device_s) / max(r.device_s, 1e-9) for r in late]
    tpot_s = (took_s - (float(np.median(first)) - began)) / max(tokens - 1, 1)
    read = bytes_read(config, executor.spec.weights_bytes, 4 if at.tiny else 2)
    return {
        "output_tokens_s": sum(map(len, answers)) / took_s,
        "ttft_s": float(np.median(first)) - began,
        "tpot_s": tpot_s,
        "weights_share_of_copy": read / tpot_s / 1e9 / copy_gb_s,
        "graph_replays": executor.graphs.table.replays if executor.graphs else 0,
        "device_share": core.stats().device_s / took_s,
        "idle_before_a_step_ms": 1e3 * float(np.median(idle_s[1:] or idle_s)),
        "model_mape": 100 * float(np.mean(errors)),
    }
