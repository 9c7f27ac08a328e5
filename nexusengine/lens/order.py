"""In which order prompts are served so that as many first tokens as possible come in time."""

from __future__ import annotations

import heapq
from collections.abc import Sequence

import numpy as np

from nexusengine.lens.view import F8, I4, Bools


def put_off(work_s: F8, allowed_s: F8, rank: Sequence[int] | None = None) -> Bools:
    """Whom to leave out, so that as many as possible of the others end in time (Moore and Hodgson, Management Science
    15(1), 1968): take them in order; when one would be late, put off the largest taken so far, of the lowest rank.

    work_s `[N]`: service time of each, in the order they are served. allowed_s `[N]`: until when each must be done.
    """
    out = np.zeros(len(work_s), np.bool_)
    taken: list[tuple[int, float, int]] = []
    done_s = 0.0
    for i, (work, allowed) in enumerate(zip(work_s.tolist(), allowed_s.tolist(), strict=True)):
        heapq.heappush(taken, (rank[i] if rank else 0, -work, i))
        done_s += work
        if done_s > allowed:
            _, largest, index = heapq.heappop(taken)
            done_s += largest
            out[index] = True
    return out


def by_priority(order: I4, tpot_s: F8, priority: I4) -> I4:
    """`order`, with the places of each class (equal tpot_s) given out anew by priority, highest first. order `[N]`:
    indices into the other two."""
    result = order.copy()
    classes = tpot_s[order]
    for value in np.unique(classes):
        places = np.nonzero(classes == value)[0]
        members = order[places]
        result[places] = members[np.argsort(-priority[members].astype(np.int64), kind="stable")]
    return result
