"""Items from a plain trace or from fixed lengths."""

from __future__ import annotations

import csv
import gzip
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from nexusengine.errors import ConfigError
from nexusengine.loadgen.items import WorkItem
from nexusengine.slo import CLASSES, MIXED, SLOClass, load_classes


def read_lengths(path: str) -> list[tuple[float | None, int, int]]:
    """(arrival_s, input_tokens, output_tokens) of each line of a CSV or JSONL file, gzipped or not."""
    with gzip.open(path, "rt") if path.endswith(".gz") else open(path) as file:
        rows: list[Mapping[str, Any]] = (
            [json.loads(line) for line in file] if ".jsonl" in path else list(csv.DictReader(file))
        )
    return [
        (
            float(r["arrival_s"]) if r.get("arrival_s") not in (None, "") else None,
            int(r["input_tokens"]),
            int(r["output_tokens"]),
        )
        for r in rows
    ]


def classes_of(text: str) -> tuple[Mapping[str, SLOClass], dict[str, float]]:
    """Classes and the share of each: of a name, of `mixed`, or of a TOML file."""
    if text in CLASSES:
        return CLASSES, {text: 1.0}
    if text == "mixed":
        return CLASSES, dict(MIXED)
    if not Path(text).exists():
        raise ConfigError(f"--classes: {text!r} is neither a class, nor mixed, nor a file", param="classes")
    classes, shares = load_classes(text)
    total = sum(shares.values())
    if total <= 0:
        raise ConfigError(f"{text}: no class has a share above 0", param="classes")
    return classes, {name: share / total for name, share in shares.items() if share > 0}


def make_items(
    lengths: list[tuple[float | None, int, int]],
    *,
    arrivals: str,
    rate: float | None,
    duration_s: float,
    classes: str,
    seed: int,
    max_tokens: int,
) -> list[WorkItem]:
    """Raises ConfigError."""
    rng = np.random.default_rng(seed)
    known, shares = classes_of(classes)
    kind, _, cv = arrivals.partition(":")
    if kind == "trace":
        if lengths[0][0] is None:
            raise ConfigError("the trace has no arrival times: give --arrivals poisson or gamma:CV", param="arrivals")
        times = [t or 0.0 for t, _, _ in lengths]
        own_rate = len(times) / max(times[-1] - times[0], 1e-9)
        stretch = 1.0 if rate is None else own_rate / rate
        rows = [((t - times[0]) * stretch, i, o) for t, (_, i, o) in zip(times, lengths, strict=True)]
        rows = [row for row in rows if row[0] < duration_s]
    else:
        if rate is None:
            raise ConfigError("give --rate", param="rate")
        shape = 1.0 if kind == "poisson" else 1.0 / float(cv) ** 2
        count = int(rate * duration_s * 2 + 50)
        sent = np.cumsum(rng.gamma(shape, 1.0 / shape / rate, count))
        picked = rng.integers(0, len(lengths), count)
        rows = [(float(t), *lengths[k][1:]) for t, k in zip(sent, picked.tolist(), strict=True) if t < duration_s]
    names = rng.choice(list(shares), len(rows), p=list(shares.values()))
    items = []
    for (t, i, o), name in zip(rows, names.tolist(), strict=True):
        o = min(o, max_tokens // 2)
        i = min(i, max_tokens - o)
        items.append(WorkItem(t, i, o, known[name].slo(i), name))
    return items
