"""Which decode steps run as CUDA graphs: buckets, a memory budget, and the reasons for steps that do not. No torch.

A graph is captured when a step of its shape first comes, the shape with most rows of that length before it, so that
the smaller ones find their memory in the pool they share.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Generic, Protocol, TypeVar

T = TypeVar("T")
_SHORTEST_TOKENS, _LONGER_BY = 1024, 4


@dataclass(frozen=True, slots=True, order=True)
class GraphShape:
    """The shape of a decode step that a graph runs.

    Attributes:
        rows: of the batch, padding included.
        longest: tokens of the longest row that it can take.
    """

    rows: int
    longest: int


@dataclass(frozen=True, slots=True)
class Captured(Generic[T]):
    """replay() computes `output` anew from the inputs at their places."""

    replay: Callable[[], None]
    output: T


class GraphDevice(Protocol[T]):
    """Captures graphs; a stand-in takes its place in tests."""

    def capture(self, compute: Callable[[], T]) -> Captured[T]:
        """Runs `compute` once as it is, so that everything it compiles is compiled, then captures it."""
        ...

    def used_bytes(self) -> int:
        """Memory of the device in use, by all processes."""
        ...


def row_buckets(most: int) -> tuple[int, ...]:
    """1, 2, 4, 8, then every multiple of 8 up to 256; `most` itself is the last if it is smaller."""
    sizes = [n for n in (1, 2, 4, *range(8, 257, 8)) if n < most]
    return (*sizes, min(most, 256))


def length_buckets(most_tokens: int) -> tuple[int, ...]:
    """1024, 4096, ... tokens, and the longest there can be.

    Split sizes and grids are fixed with a graph, and those of the longest context would make the steps of short ones
    slow.
    """
    sizes, size = [], _SHORTEST_TOKENS
    while size < most_tokens:
        sizes.append(size)
        size *= _LONGER_BY
    return (*sizes, most_tokens)


@dataclass(slots=True)
class GraphTable(Generic[T]):
    """The graphs captured so far, within a memory budget.

    Attributes:
        device: captures them.
        max_rows: most rows of a step.
        max_tokens: longest row.
        budget_bytes: for all graphs together.
        used_bytes: of the budget.
        replays: steps that ran as graphs.
        refused: shapes that run without a graph, and why.
    """

    device: GraphDevice[T]
    max_rows: int
    max_tokens: int
    budget_bytes: int
    used_bytes: int = 0
    replays: int = 0
    refused: dict[GraphShape, str] = field(default_factory=dict)
    _graphs: dict[GraphShape, Captured[T]] = field(default_factory=dict)

    @property
    def captured(self) -> tuple[GraphShape, ...]:
        return tuple(self._graphs)

    def shape_for(self, rows: int, longest: int) -> GraphShape | None:
        """The smallest shape that takes the step; None if it has too many rows or too long ones."""
        size = next((n for n in row_buckets(self.max_rows) if n >= rows), None)
        length = next((n for n in length_buckets(self.max_tokens) if n >= longest), None)
        return None if size is None or length is None else GraphShape(size, length)

    def graph(self, shape: GraphShape, compute: Callable[[GraphShape], Callable[[], T]]) -> Captured[T] | None:
        """The graph of a shape, captured if need be.

        Args:
            shape: the smallest that takes the step.
            compute: returns what computes a shape's step; called where it is to be captured, with harmless inputs in
                place.

        Returns:
            None if the shape has to run without a graph, see `refused`.
        """
        largest = GraphShape(row_buckets(self.max_rows)[-1], shape.longest)
        for one in (largest, shape):
            if one not in self._graphs and one not in self.refused:
                self._capture(one, compute(one))
        return self._graphs.get(shape)

    def _capture(self, shape: GraphShape, compute: Callable[[], T]) -> None:
        if self.used_bytes >= self.budget_bytes:
            self.refused[shape] = f"the {self.budget_bytes} bytes set aside for graphs are used up"
            return
        before_bytes = self.device.used_bytes()
        try:
            captured = self.device.capture(compute)
        except RuntimeError as error:  # out of memory among them: the step runs as it would without graphs
            self.refused[shape] = f"it could not be captured: {error}"
            return
        took_bytes = max(self.device.used_bytes() - before_bytes, 0)
        if self.used_bytes + took_bytes > self.budget_bytes:
            self.refused[shape] = (
                f"it takes {took_bytes} bytes; of {self.budget_bytes} set aside for graphs, {self.used_bytes} are used"
            )
            return
        self.used_bytes += took_bytes
        self._graphs[shape] = captured
