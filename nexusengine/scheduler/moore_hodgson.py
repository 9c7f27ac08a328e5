"""The rule of Moore and Hodgson: the most that can be done in time."""

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
    newcomers: Bools | None = None,
    seats: F8 | None = None,
) -> Bools:
    """Whom to leave out, so that as many as possible of the others end in time (Moore and Hodgson, Management Science
    15(1), 1968): take them in order; when one would be late, put off the largest taken so far, of the lowest rank. The
    same where a newcomer would find no seat in time, with the largest newcomer: with both at once a rule of thumb.

    work_s `[N]`: service time of each, in the order they are served. allowed_s `[N]`: until when each must be done.
    newcomers `[N]`: who needs a seat; seats `[N]`: how many newcomers can have one early enough for each. None: there
    are seats for all.
    """
    out = np.zeros(len(work_s), np.bool_)
    taken: list[tuple[int, float, int]] = []
    taken_newcomers: list[tuple[int, float, int]] = []
    works = work_s.tolist()
    starts = [False] * len(works) if newcomers is None else newcomers.tolist()
    places = [math.inf] * len(works) if seats is None else seats.tolist()
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
            heapq.heappush(taken_newcomers, item)
            started += 1
            if started > places[i]:
                leave_out(taken_newcomers)
        if done_s > allowed and not out[i]:
            leave_out(taken)
    return out
