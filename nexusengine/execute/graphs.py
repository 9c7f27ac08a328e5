"""Which decode steps run as CUDA graphs: buckets, a memory budget, and the reasons for steps that do not. No torch.

All graphs are captured when the executor is made, those of most rows and longest rows first, so that the others find
their memory in the pool they share. The first capture that fails turns graphs off for good.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Generic, Protocol, TypeVar

T = TypeVar("T")
_SHORTEST_TOKENS, _LONGER_BY = 1024, 4
_FINE_TOKENS = 4096
"""Of rows longer than this there are fewer shapes: they are few in a step, and each graph takes time and memory."""


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

    def give_back(self) -> None:
        """Return memory that nothing uses, that of dropped graphs among it, to the device."""
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
    """The graphs of an executor, within a memory budget.

    Attributes:
        device: captures them.
        max_rows: most rows of a step.
        max_tokens: longest row.
        budget_bytes: for all graphs together.
        used_bytes: of the budget.
        replays: steps that ran as graphs.
        refused: shapes that have no graph because of the budget, and why.
        failure: what turned graphs off for good; "" if nothing did.
    """

    device: GraphDevice[T]
    max_rows: int
    max_tokens: int
    budget_bytes: int
    used_bytes: int = 0
    replays: int = 0
    refused: dict[GraphShape, str] = field(default_factory=dict)
    failure: str = ""
    _graphs: dict[GraphShape, Captured[T]] = field(default_factory=dict)
    _smallest_first: list[GraphShape] = field(default_factory=list)

    @property
    def captured(self) -> tuple[GraphShape, ...]:
        return tuple(self._graphs)

    def shapes(self) -> tuple[GraphShape, ...]:
        """Every shape there is to be a graph of, the largest first."""
        fine = row_buckets(self.max_rows)
        coarse = tuple(n for n in fine if n & (n - 1) == 0 or n == fine[-1])
        lengths = length_buckets(self.max_tokens)
        every = [GraphShape(rows, n) for n in lengths for rows in (fine if n <= _FINE_TOKENS else coarse)]
        return tuple(sorted(every, reverse=True))

    def shape_for(self, rows: int, longest: int) -> GraphShape | None:
        """The smallest captured shape that takes the step, of the shortest rows that do; None if there is none."""
        return next((s for s in self._smallest_first if s.rows >= rows and s.longest >= longest), None)

    def graph(self, shape: GraphShape) -> Captured[T]:
        """The graph of a captured shape.

        Raises:
            KeyError: there is none.
        """
        return self._graphs[shape]

    def capture_all(
        self, compute: Callable[[GraphShape], Callable[[], T]], progress: Callable[[float], None] = lambda share: None
    ) -> None:
        """Capture the graphs of all shapes, as far as the budget goes; see `refused` and `failure`.

        Args:
            compute: returns what computes a shape's step; called where it is to be captured, with harmless inputs in
                place.
            progress: told the share of shapes that are done, 0..1.
        """
        before_bytes, shapes = self.device.used_bytes(), self.shapes()
        for done, shape in enumerate(shapes):
            progress(done / len(shapes))
            try:
                self._capture(shape, compute(shape))
            except Exception as error:  # of CUDA, torch, Triton or a library; what it leaves behind is not known
                self.failure = (
                    f"the graph of {shape.rows} rows up to {shape.longest} tokens could not be captured: "
                    f"{type(error).__name__}: {error}"
                )
                self._graphs.clear()
                self.used_bytes = 0
                return
        self._smallest_first = sorted(self._graphs, key=lambda s: (s.longest, s.rows))
        self.device.give_back()
        self.used_bytes = max(self.device.used_bytes() - before_bytes, 0)

    def _capture(self, shape: GraphShape, compute: Callable[[], T]) -> None:
        if self.used_bytes >= self.budget_bytes:
            self.refused[shape] = f"the {self.budget_bytes} bytes set aside for graphs are used up"
            return
        before_bytes = self.device.used_bytes()
        captured = self.device.capture(compute)
        took_bytes = max(self.device.used_bytes() - before_bytes, 0)
        if self.used_bytes + took_bytes > self.budget_bytes:
            self.refused[shape] = (
                f"it takes {took_bytes} bytes; of {self.budget_bytes} set aside for graphs, {self.used_bytes} are used"
            )
            del captured
            self.device.give_back()
            return
        self.used_bytes += took_bytes
        self._graphs[shape] = captured
