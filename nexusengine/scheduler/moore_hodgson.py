"""The rule of Moore and Hodgson: which jobs to leave out so that the most end in time."""

from __future__ import annotations

import heapq
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
    if rank is None:
        rank = [0] * len(work_s)
    if slots is None or needs_slot is None:
        return _defer_for_time(work_s, allowed_s, rank)
    if not np.count_nonzero(work_s.cumsum() > allowed_s):
        out = np.zeros(len(work_s), np.bool_)
        starting = np.nonzero(needs_slot)[0]
        of_starting = [rank[i] for i in starting.tolist()]
        out[starting] = _defer_for_slots(work_s[starting], slots[starting], of_starting)
        return out
    return _defer_for_both(work_s, allowed_s, rank, needs_slot, slots)


def _defer_for_slots(work_s: F8, slots: F8, rank: Sequence[int]) -> Bools:
    """The same where there is time for all, of those who need a slot."""
    out = np.zeros(len(work_s), np.bool_)
    taken: list[tuple[int, float, int]] = []
    for item, most in zip(zip(rank, (-work_s).tolist(), range(len(rank)), strict=True), slots.tolist(), strict=True):
        if len(taken) + 1 > most:
            out[heapq.heappushpop(taken, item)[2]] = True
        else:
            heapq.heappush(taken, item)
    return out


def _defer_for_both(work_s: F8, allowed_s: F8, rank: Sequence[int], needs_slot: Bools, slots: F8) -> Bools:
    out = bytearray(len(work_s))
    sums_s, starting = work_s.cumsum(), needs_slot.cumsum()
    first = int(((sums_s > allowed_s) | (starting > slots)).argmax())  # nobody before is left out before it
    works, starts = work_s.tolist(), needs_slot.tolist()
    items = list(zip(rank, (-work_s).tolist(), range(len(rank)), strict=True))
    taken, taken_starting = items[:first], [item for item in items[:first] if starts[item[2]]]
    heapq.heapify(taken)
    heapq.heapify(taken_starting)
    done_s, started = (float(sums_s[first - 1]), int(starting[first - 1])) if first else (0.0, 0)
    push, bounds = heapq.heappush, zip(items[first:], allowed_s[first:].tolist(), slots[first:].tolist(), strict=True)
    for item, allowed, most in bounds:
        i = item[2]
        push(taken, item)
        done_s += works[i]
        if starts[i]:
            if started + 1 <= most:
                push(taken_starting, item)
                started += 1
            else:
                done_s -= works[_next_out(taken_starting, heapq.heappushpop(taken_starting, item)[2], out)]
        if done_s > allowed and not out[i]:
            gone = _next_out(taken, heapq.heappop(taken)[2], out)
            done_s, started = done_s - works[gone], started - starts[gone]
    return np.frombuffer(out, np.bool_)


def _next_out(taken: list[tuple[int, float, int]], index: int, out: bytearray) -> int:
    """Leave out `index`, or the next of those taken if it is out already, through the other heap; who that is."""
    while out[index]:
        index = heapq.heappop(taken)[2]
    out[index] = True
    return index


def _defer_for_time(work_s: F8, allowed_s: F8, rank: Sequence[int]) -> Bools:
    """The same where there are slots for all: looks only at those by whom time is exceeded."""
    out = np.zeros(len(work_s), np.bool_)
    excess_s = work_s.cumsum() - allowed_s
    items = list(zip(rank, (-work_s).tolist(), range(len(work_s)), strict=True))
    taken: list[tuple[int, float, int]] = []
    saved_s, seen = 0.0, 0
    while seen < len(items):
        late = excess_s[seen:] > saved_s
        i = seen + int(late.argmax())
        if not late[i - seen]:
            break
        for item in items[seen : i + 1]:
            heapq.heappush(taken, item)
        _, less_s, index = heapq.heappop(taken)
        out[index] = True
        saved_s -= less_s
        seen = i + 1
    return out
