"""Recorded traces that were never recorded."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from nexusengine.perf.features import StepFeatures
from nexusengine.perf.registry import make_model
from nexusengine.recording import format as lines
from nexusengine.sim.workload.build import Builder, Workload, WorkloadSpec

SERVER = lines.Server(model="smollm2-135m", devices="cpu:1,cpu:1", scheduler="fcfs", router="least-requests")


def header(**changed: Any) -> lines.Header:
    fields: dict[str, Any] = {"nexusengine_trace": 1, "recording": "a", "part": 0, "started_unix_s": 1000.0}
    return lines.Header(**(fields | {"server": SERVER} | changed))


def worker(name: str = "w0", device: str = "cpu:1", **changed: Any) -> lines.Worker:
    model = make_model()
    for tokens in (1, 2, 4, 8, 16, 32, 64) * 6:
        model.observe(StepFeatures(tokens, tokens, 0, 0.0, 100 * tokens), 0.01 + 0.001 * tokens)
        model.observe(StepFeatures(8 * tokens, 1, 1, 32.0 * tokens**2, 0), 0.02 + 0.002 * tokens)
    fields: dict[str, Any] = {"block_tokens": 16, "kv_tokens": 16_000, "max_model_len": 4096, "max_batch_tokens": 512}
    fields |= {"steps": 1000, "host_s": 2.0, "learned": lines.Learned.of(model.snapshot())}
    return lines.Worker(worker=name, device=device, **(fields | changed))


def request(i: int, **changed: Any) -> lines.Request:
    fields: dict[str, Any] = {"request": i, "arrival_s": 0.5 * i, "input_tokens": 50, "output_tokens": 10}
    fields |= {"ended": "length", "queue_ms": 4.0, "ttft_ms": 40.0, "tpot_ms": 12.0, "e2e_ms": 150.0, "worker": "w0"}
    return lines.Request(**(fields | changed))


def write(path: Path, content: Sequence[lines.Line]) -> str:
    path.write_bytes(b"".join(map(lines.encode, content)))
    return str(path)


def sample(path: Path, count: int = 40) -> str:
    slo = lines.Bounds(ttft_ms=600.0, tpot_ms=60.0)
    requests = [request(i, slo=slo, met=True, met_strict=True, **{"slo_class": "interactive"}) for i in range(count)]
    return write(path, [header(), lines.Workers(at_s=1.0, workers=(worker(), worker("w1"))), *requests])


def workload(*paths: str, **changed: Any) -> Workload:
    spec: dict[str, Any] = {"trace": paths, "classes": "recorded", "stated_limit": "recorded"}
    return Builder(WorkloadSpec(**(spec | changed))).build()
