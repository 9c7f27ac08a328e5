"""How a system is measured in its own process, for cpu_peer_worker.py: imports nothing but the standard library."""

from __future__ import annotations

import os
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, Protocol

Prompts = list[list[int]]
COLUMNS = ("throughput", "single", "ttft_ms")


class Runner(Protocol):
    """generate: all prompts as the system likes best, `output` tokens each; returns the tokens made."""

    def generate(self, prompts: Prompts, output: int) -> int: ...


def seconds(runner: Runner, prompts: Prompts, output: int) -> float:
    """Raises RuntimeError if not every prompt got its tokens: a figure of less work would not compare."""
    began_s = time.perf_counter()
    made = runner.generate(prompts, output)
    took_s = time.perf_counter() - began_s
    if made != len(prompts) * output:
        raise RuntimeError(f"made {made} tokens instead of {len(prompts) * output}")
    return took_s


def measured(runner: Runner, work: dict[str, Any], columns: list[str]) -> dict[str, float]:
    """The wanted columns; with throughput the peak of memory too."""
    if hasattr(runner, "measured"):  # not a system but the machine
        return dict(runner.measured())
    prompts: list[list[int]] = work["prompts"]
    output: int = work["output"]
    found: dict[str, float] = {}

    def single() -> float:
        first_s, whole_s = (seconds(runner, prompts[:1], n) for n in (1, output))
        return (output - 1) / max(whole_s - first_s, 1e-9)

    if "throughput" in columns:
        found["throughput"] = len(prompts) * output / seconds(runner, prompts, output)
    if "single" in columns:
        found["single"] = median(single)
    if "ttft_ms" in columns:
        found["ttft_ms"] = median(lambda: seconds(runner, [work["long_prompt"]], 1)) * 1e3
    if "throughput" in columns:
        found["peak_mb"] = peak_mb(os.getpid())
    return found


def median(measure: Callable[[], float]) -> float:
    """Of three, or of as many as begin within 5 s: what takes a second is at the mercy of a moment."""
    until_s, found = time.perf_counter() + 5, [measure()]
    while len(found) < 3 and time.perf_counter() < until_s:
        found.append(measure())
    return statistics.median(found)


def peak_mb(process: int) -> float:
    """Peak resident memory of a process and of those it started that are still there."""
    try:
        status = Path(f"/proc/{process}/status").read_text().splitlines()
        children = Path(f"/proc/{process}/task/{process}/children").read_text().split()
    except FileNotFoundError:  # has ended meanwhile
        return 0.0
    own_kb = sum(float(line.split()[1]) for line in status if line.startswith("VmHWM:"))
    return own_kb / 1024 + sum(peak_mb(int(child)) for child in children)
