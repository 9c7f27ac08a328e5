"""The workloads of benchmarks/engine.py: those it was developed on, and those it was not."""

from __future__ import annotations

import csv
import gzip
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

AZURE, SHAREGPT = "azure2023_conv.csv.gz", "sharegpt_lengths_llama2.csv.gz"
HALF_S = 1751.0  # half of the Azure trace
LONG_SHARE, LONG_TOKENS = 0.1, (8_000, 64_000)  # of the long-prompt mix: log-uniform


@dataclass(frozen=True, slots=True)
class Workload:
    """make: writes the trace into a folder, from the folder of traces, and returns its path. guess_rps: where searches
    for a goodput begin."""

    make: Callable[[Path, Path], Path]
    guess_rps: float
    arrivals: str = "poisson"
    classes: str = "interactive"
    duration_s: float = 120.0


def _given(name: str) -> Callable[[Path, Path], Path]:
    return lambda traces, out: traces / name


def _half(second: bool) -> Callable[[Path, Path], Path]:
    def make(traces: Path, out: Path) -> Path:
        rows = [r for r in _read(traces / AZURE) if (float(r["arrival_s"]) >= HALF_S) == second]
        first_s = float(rows[0]["arrival_s"])
        path = out / f"azure_{'second' if second else 'first'}.csv"
        _write(path, ((float(r["arrival_s"]) - first_s, r["input_tokens"], r["output_tokens"]) for r in rows))
        return path

    return make


def _long(second: bool) -> Callable[[Path, Path], Path]:
    """Requests of one half of the Azure trace, of which a tenth has a long prompt instead of its own."""

    def make(traces: Path, out: Path) -> Path:
        rng = np.random.default_rng(2 if second else 1)
        rows = [r for r in _read(traces / AZURE) if (float(r["arrival_s"]) >= HALF_S) == second]
        long = rng.random(len(rows)) < LONG_SHARE
        low, high = np.log(LONG_TOKENS)
        tokens = np.exp(rng.uniform(low, high, len(rows))).astype(int)
        path = out / f"long_{'second' if second else 'first'}.csv"
        rows_out = (("", tokens[i] if long[i] else r["input_tokens"], r["output_tokens"]) for i, r in enumerate(rows))
        _write(path, rows_out)
        return path

    return make


def _read(path: Path) -> Iterator[dict[str, str]]:
    with gzip.open(path, "rt") as file:
        yield from csv.DictReader(file)


def _write(path: Path, rows: Iterable[Sequence[Any]]) -> None:
    with path.open("w", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(("arrival_s", "input_tokens", "output_tokens"))
        writer.writerows(rows)


DEVELOPMENT = {
    "azure": Workload(_half(False), 10.0, "trace"),
    "bursty": Workload(_half(False), 8.0, "gamma:2.5"),
    "sharegpt": Workload(_given(SHAREGPT), 20.0),
    "long": Workload(_long(False), 3.0, duration_s=300.0),
    "mixed": Workload(_half(False), 10.0, classes="mixed"),
    "servegen": Workload(_given("servegen/m_small.jsonl.gz"), 100.0, "trace", duration_s=60.0),
}
UNSEEN = {
    "azure-2": Workload(_half(True), 10.0, "trace"),
    "bursty-2": Workload(_half(True), 8.0, "gamma:2.5"),
    "arxiv": Workload(_given("arxiv_summarization_lengths_llama2.csv.gz"), 2.0),
    "long-2": Workload(_long(True), 3.0, duration_s=300.0),
    "mixed-2": Workload(_half(True), 10.0, classes="mixed"),
    "mooncake": Workload(_given("mooncake_conversation.jsonl.gz"), 1.0, "trace", duration_s=300.0),
    "servegen-large": Workload(_given("servegen/m_large.jsonl.gz"), 50.0, "trace", duration_s=60.0),
}
WORKLOADS = {**DEVELOPMENT, **UNSEEN}
