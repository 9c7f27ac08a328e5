"""The rule of Moore and Hodgson: which jobs to leave out so that the most end in time."""

from __future__ import annotations

import heapq
import math
from collections.abc import Sequence

import numpy as np

from nexusengine.arrays import F8, Bools


def defer(
    work_s: F8,
    allowed_s: F8,
    rank: Sequence[int] | None = None,
    needs_slot: Bools | None = None,
    slots: F8 | None = None,
) -> Bools:
    """Whom to leave out, so that as many as possible of the others end in time.

    Moore and Hodgson (Management Science 15(1), 1968): take jobs in order; when one would be late, defer the largest
    taken so far, of the lowest rank. The same where a waiting request would find no running slot in time, with the
    largest that needs one: with both at once a rule of thumb.

    Args:
        work_s: `[N]`, service time of each, in the order they are served.
        allowed_s: `[N]`, until when each must be done.
        rank: `[N]`, the lowest are deferred first.
        needs_slot: `[N]`, who waits for a running slot.
        slots: `[N]`, how many of them can have one early enough for each. None: there are slots for all.

    Returns:
        Bool `[N]`, who is deferred.
    """
    out = np.zeros(len(work_s), np.bool_)
    taken: list[tuple[int, float, int]] = []
    taken_starting: list[tuple[int, float, int]] = []
    works = work_s.tolist()
    starts = [False] * len(works) if needs_slot is None else needs_slot.tolist()
    most = [math.inf] * len(works) if slots is None else slots.tolist()
    done_s, started = 0.0, 0

    def leave_out(among: list[tuple[int, float, int]]) -> None:
        nonlocal done_s, started
        index = heapq.heappop(among)[2]
        while out[index]:  # left out already, through the other heap
            index = heapq.heappop(among)[2]
        out[index] = True
        done_s -= works[index]
        started -= starts[index]

    for i, (work, allowed) in enumerate(zip(works, allowed_s.tolist(), strict=True)):
        item = (rank[i] if rank else 0, -work, i)
        heapq.heappush(taken, item)
        done_s += work
        if starts[i]:
            heapq.heappush(taken_starting, item)
            started += 1
            if started > most[i]:
                leave_out(taken_starting)
        if done_s > allowed and not out[i]:
            leave_out(taken)
    return out
