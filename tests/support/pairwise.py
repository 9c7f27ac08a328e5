"""Fewer cases than a full product: every two values of different parameters meet in at least one."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import combinations, product
from typing import Any


def pairwise(*parameters: Sequence[Any]) -> list[tuple[Any, ...]]:
    """Rows with one value of each parameter; greedy, the same rows every time. parameters: at least two."""
    indices = [range(len(values)) for values in parameters]
    missing = {
        (a, i, b, j) for a, b in combinations(range(len(parameters)), 2) for i, j in product(indices[a], indices[b])
    }

    def new(row: tuple[int, ...]) -> set[tuple[int, int, int, int]]:
        return missing & {(a, row[a], b, row[b]) for a, b in combinations(range(len(row)), 2)}

    rows = []
    while missing:
        best = max(product(*indices), key=lambda row: len(new(row)))
        missing -= new(best)
        rows.append(tuple(values[i] for values, i in zip(parameters, best, strict=True)))
    return rows
