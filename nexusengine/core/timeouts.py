"""Which requests have run out of time."""

from __future__ import annotations

import heapq
from collections.abc import Container


class Timeouts:
    """Timestamps by which requests must have ended, the earliest first.

    Args:
        most: beyond so many, those of requests that have ended are forgotten.
    """

    def __init__(self, most: int) -> None:
        self._most = most
        self._heap: list[tuple[float, str]] = []

    def __len__(self) -> int:
        return len(self._heap)

    def watch(self, deadline_s: float, request_id: str, alive: Container[str]) -> None:
        if len(self._heap) > self._most:
            self._heap = [entry for entry in self._heap if entry[1] in alive]
            heapq.heapify(self._heap)
        heapq.heappush(self._heap, (deadline_s, request_id))

    def expired(self, now: float) -> list[tuple[float, str]]:
        """Deadlines that have passed, with their requests, which may have ended meanwhile; each is told once."""
        found = []
        while self._heap and self._heap[0][0] <= now:
            found.append(heapq.heappop(self._heap))
        return found
