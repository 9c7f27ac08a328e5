"""Block ids kept as runs of consecutive numbers: the sequences of long sessions would fill gigabytes otherwise."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import overload


class Runs(Sequence[int]):
    """The numbers of `(first, count)` runs, one after the other."""

    __slots__ = ("_length", "_runs")

    def __init__(self, runs: Iterable[tuple[int, int]] = ()) -> None:
        merged: list[tuple[int, int]] = []
        for first, count in runs:
            if merged and merged[-1][0] + merged[-1][1] == first:
                merged[-1] = (merged[-1][0], merged[-1][1] + count)
            elif count:
                merged.append((first, count))
        self._runs = tuple(merged)
        self._length = sum(count for _, count in merged)

    def __len__(self) -> int:
        return self._length

    @overload
    def __getitem__(self, index: int) -> int: ...
    @overload
    def __getitem__(self, index: slice) -> Sequence[int]: ...
    def __getitem__(self, index: int | slice) -> int | Sequence[int]:
        if isinstance(index, slice):
            start, stop, step = index.indices(self._length)
            if start == 0 and step == 1:
                return self._beginning(stop)
            return [self[i] for i in range(start, stop, step)]
        at = index + self._length if index < 0 else index
        if 0 <= at < self._length:
            for first, count in self._runs:
                if at < count:
                    return first + at
                at -= count
        raise IndexError(index)

    def begins(self, other: Runs) -> bool:
        """Whether `other` is a beginning of this."""
        return self._beginning(len(other))._runs == other._runs

    def _beginning(self, length: int) -> Runs:
        kept: list[tuple[int, int]] = []
        for first, count in self._runs:
            if length <= 0:
                break
            kept.append((first, min(count, length)))
            length -= count
        return Runs(kept)
