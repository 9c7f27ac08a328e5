"""What threads that write files take from their queues: batches, so that little is written often enough."""

from __future__ import annotations

import queue
import time
from typing import TypeVar

T = TypeVar("T")


def next_batch(items: queue.Queue[T | None], most: int, within_s: float) -> tuple[list[T], bool]:
    """What comes within some seconds, at most so much; waits that long for it.

    Returns:
        The items; and whether more may come: None in the queue says that no more do.
    """
    batch: list[T] = []
    until_s = time.monotonic() + within_s
    while len(batch) < most:
        try:
            item = items.get(timeout=max(until_s - time.monotonic(), 0.0))
        except queue.Empty:
            break
        if item is None:
            return batch, False
        batch.append(item)
    return batch, True
