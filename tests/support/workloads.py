"""Workloads of the simulator, for tests."""

from __future__ import annotations

from pathlib import Path

import numpy as np

from nexusengine.sim.workload.build import Builder, Workload, WorkloadSpec


def build(trace: str | Path, **spec: object) -> Workload:
    return Builder(WorkloadSpec(trace=str(trace), **spec)).build()  # type: ignore[arg-type]


def lengths(workload: Workload) -> list[tuple[int, int]]:
    return [(job.prompt_tokens, job.output_tokens) for job in workload.jobs]


def arrivals(workload: Workload) -> np.ndarray:
    return np.array([job.request.arrival_s for job in workload.jobs])
