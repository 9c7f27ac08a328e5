"""The phase that trains the performance model, scores it on steps it has not seen, and writes profiles."""

from __future__ import annotations

import re
from itertools import product
from pathlib import Path

import numpy as np
import torch

from gpu_phases.common import LARGE, SMALL, TINY, Cases, Findings, Setting, make_executor
from nexusengine.execute.torch_executor import TorchExecutor
from nexusengine.model_config import ModelConfig
from nexusengine.perf.features import StepFeatures
from nexusengine.perf.registry import make_model
from nexusengine.profiles.fit import fit_steps
from nexusengine.profiles.user_file import write_profile
from nexusengine.worker.calibrate import ProbeShape, probe_batch

_ROWS = 64


def performance_model(at: Setting) -> Findings:
    """The model learns from one grid of steps and is scored on mixed steps it has not seen.

    The grid's steps, each run by itself, also make a profile of this device for the simulator.
    """
    cases = Cases(at)
    # (name of the model in the profile, shape, contexts of the grid, contexts held out)
    shapes = [("tiny", TINY, (64, 256), 128)] if at.tiny else [("llama-3.1-8b", LARGE, (128, 2048), 1024)]
    shapes = shapes if at.tiny else [("random-0.6b", SMALL, (128, 2048), 1024), *shapes]
    for name, config, ends, between in shapes:
        cases.run(name, lambda n=name, c=config, e=ends, b=between: _learned(at, n, c, e, b))  # type: ignore[misc]
    return cases.end()


def _learned(at: Setting, name: str, config: ModelConfig, ends: tuple[int, int], between: int) -> Findings:
    """Error of one model on steps between the contexts `ends` that it learnt from."""
    chunks = (0, 32, 64) if at.tiny else (0, 128, 512, 1024)
    executor = make_executor(at, config, "float32" if at.tiny else "bfloat16", max_running=_ROWS, max_batch_tokens=1280)
    grid = {
        ProbeShape(d, c if d else 0, p, pc if p else 0)
        for d, c, p, pc in product((0, 1, 2, 4) if at.tiny else (0, 1, 8, 32, 64), ends, chunks, (0, ends[1]))
    }
    held_out = [ProbeShape(d, between, p, between) for d in ((3,) if at.tiny else (4, 16, 48)) for p in (48, 256)]
    observed = _measure(executor, sorted(grid, key=repr), 16 if at.tiny else 6)
    scored = _measure(executor, held_out, 8)
    model = make_model()
    for run in range(max(len(times) for _, times in observed)):
        for features, times in observed:
            if run < len(times):
                model.observe(features, times[run])
    errors = [abs(model.predict(f).mean_s / float(np.median(times)) - 1) for f, times in scored]
    if not errors:
        raise AssertionError("no held-out step fits the executor")
    found = {
        "observed": len(observed),
        "held_out": len(scored),
        "mape": 100 * float(np.mean(errors)),
        "aim": 5.0,
        "profile": _profile(at, name, executor, observed),
    }
    executor.close()
    return found


def _measure(executor: TorchExecutor, shapes: list[ProbeShape], runs: int) -> list[tuple[StepFeatures, list[float]]]:
    """Seconds of each run of each step that the executor has room for; the first run of each warms up."""
    found = []
    for shape in shapes:
        if not shape.decodes + shape.chunk or (batch := probe_batch(executor, shape, _ROWS)) is None:
            continue
        times = []
        for _ in range(runs + 1):
            executor.submit(batch)
            times.append(executor.collect().device_s)
        found.append((StepFeatures.of(batch.counts, batch.starts), times[1:]))
    return found


def _profile(at: Setting, model: str, executor: TorchExecutor, observed: list[tuple[StepFeatures, list[float]]]) -> str:
    """Where the profile was written."""
    if at.beside is None:
        return "not written: no --json"
    spec = executor.spec
    device = re.sub(r"[^a-z0-9]+", "-", spec.device_name.lower()).strip("-") or at.device.type
    path = Path(f"{at.beside.with_suffix('')}.{device}.{model}.json")
    fit = fit_steps([f for f, times in observed for _ in times], [t for _, times in observed for t in times])
    write_profile(
        path,
        device=device,
        model=model,
        fit=fit,
        kv_capacity_tokens=(spec.num_blocks - 1) * spec.block_size,
        weights_bytes=spec.weights_bytes,
        source=f"gpu_check: {fit.steps} steps with random weights, {spec.attention_backend}, torch {torch.__version__}",
    )
    return str(path)
