"""First samples for the performance model: a few made-up steps of different sizes, measured before any request waits.

Runs on a KV cache that nobody uses yet. What it writes there is never read: no block has a hash in the prefix cache,
and each is written by its next owner before that reads it.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np

from nexusengine.execute.base import Executor
from nexusengine.execute.batch import StepBatch
from nexusengine.perf.features import StepFeatures
from nexusengine.perf.model import PerformanceModel
from nexusengine.sampling.table import SamplingTable


@dataclass(frozen=True, slots=True)
class ProbeShape:
    """decodes with `context` tokens each, and a chunk after `chunk_context` tokens."""

    decodes: int
    context: int = 128
    chunk: int = 0
    chunk_context: int = 0


_SHAPES = (
    ProbeShape(1),
    ProbeShape(4),
    ProbeShape(1, 1024),
    ProbeShape(0, chunk=16),
    ProbeShape(8),
    ProbeShape(8, chunk=64),
    ProbeShape(16, 512),
    ProbeShape(32),
    ProbeShape(0, chunk=128),
    ProbeShape(0, chunk=256),
    ProbeShape(32, 1024),
    ProbeShape(16, chunk=256, chunk_context=1024),
    ProbeShape(64),
    ProbeShape(0, chunk=512),
    ProbeShape(32, chunk=512, chunk_context=512),
    ProbeShape(0, chunk=1024),
    ProbeShape(0, chunk=1024, chunk_context=3072),
    ProbeShape(0, chunk=2048),
    ProbeShape(0, chunk=4096),
    ProbeShape(0, chunk=8192),
)
_RUNS, _RUNS_OF_LARGE, _LARGE = 3, 2, 512  # of each; the first chooses kernels and fills caches, and is not observed


def calibrate(
    executor: Executor,
    model: PerformanceModel,
    *,
    max_running: int,
    seconds: float = 2.0,
    timer: Callable[[], float] = time.perf_counter,
) -> list[tuple[StepFeatures, float]]:
    """Run made-up steps that the model observes, the cheap ones first; what the executor raises passes through.

    Args:
        seconds: goes on as long as the next step is predicted to end within them.

    Returns:
        The steps that the model has observed, and their seconds.
    """
    ends_s = timer() + seconds
    observed: list[tuple[StepFeatures, float]] = []
    for shape in _SHAPES:
        batch = probe_batch(executor, shape, max_running)
        if batch is None:
            continue
        features = StepFeatures.of(batch.counts, batch.starts)
        for run in range(_RUNS if features.tokens < _LARGE else _RUNS_OF_LARGE):
            if timer() + 1.5 * model.predict(features).upper_s > ends_s:
                return observed
            executor.submit(batch)
            result = executor.collect()
            if run:
                model.observe(features, result.device_s)
                observed.append((features, result.device_s))
    return observed


def probe_batch(executor: Executor, shape: ProbeShape, max_running: int) -> StepBatch | None:
    """The batch of a made-up step; None if the executor has no room for it, or no memory yet.

    Pages that nobody has written are all the same one, and reading it says nothing.
    """
    spec, size = executor.spec, executor.spec.block_size
    counts = np.array([1] * shape.decodes + [shape.chunk] * (shape.chunk > 0), np.int32)
    starts = np.array([shape.context] * shape.decodes + [shape.chunk_context] * (shape.chunk > 0), np.int32)
    ends = starts + counts
    blocks = -(-ends // size)
    if (
        len(counts) > max_running
        or counts.sum() > spec.max_batch_tokens
        or ends.max() > spec.max_model_len
        or blocks.sum() > (spec.ready_blocks or spec.num_blocks) - 1
    ):
        return None
    tables = np.zeros((len(counts), int(blocks.max())), np.int32)
    first = 1
    for row, n in zip(tables, blocks.tolist(), strict=True):
        row[:n] = np.arange(first, first + n)
        first += n
    return StepBatch(
        slots=np.arange(len(counts), dtype=np.int32),
        starts=starts,
        counts=counts,
        sampled=np.ones(len(counts), np.bool_),
        token_ids=np.zeros(int(counts.sum()), np.int32),
        block_tables=tables,
        sampling=SamplingTable.empty(len(counts)),
    )
