"""Closed loops: sessions whose next request comes some time after the last answer."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from nexusengine.sim.workload.arrivals import arrivals_of
from nexusengine.sim.workload.draw import Stream, rng_for
from nexusengine.sim.workload.entries import Entry
from nexusengine.sim.workload.runs import Runs

Session = tuple[Entry, ...]


def fitting_scale(sessions: tuple[Session, ...], max_tokens: int) -> float:
    """By what lengths have to be divided for 99 of 100 requests to fit into `max_tokens`; at least 1."""
    totals = [e.input_tokens + e.output_tokens for session in sessions for e in session]
    return max(float(np.quantile(totals, 0.99)) / max_tokens, 1.0)


def draw_sessions(
    sessions: tuple[Session, ...], cv: float, rate_per_s: float, duration_s: float, seed: int
) -> list[tuple[float, int]]:
    """(timestamp of its first request, index of the session), shuffled by seed as single requests are."""
    arrivals = arrivals_of(cv, rate_per_s, duration_s, seed)
    rng = rng_for(seed, Stream.LENGTHS)
    order: list[int] = []
    while len(order) < len(arrivals):
        order.extend(rng.permutation(len(sessions)).tolist())
    return list(zip(arrivals.tolist(), order, strict=False))


def named_blocks(session: Session, i: int) -> tuple[Sequence[int], bool]:
    """The block ids of request i, and whether they go on into its answer.

    They do where the next request's prompt begins with this one's.
    """
    own = session[i].block_ids
    if i + 1 < len(session):
        following = session[i + 1].block_ids
        if isinstance(own, Runs) and isinstance(following, Runs) and following.begins(own):
            return following, True
    return own, False
