"""One engine on a virtual clock, without router or clients."""

from __future__ import annotations

import math
from collections.abc import Sequence

from nexusengine.sim.engine import SimEngine
from nexusengine.sim.job import Job


def serve_alone(engine: SimEngine, jobs: Sequence[Job], *, most_events: float = math.inf) -> SimEngine:
    """Let an engine serve jobs, in order of their arrival, until it has done them all, or `most_events` have passed."""
    until_s: float | None = None
    pending, events = list(reversed(jobs)), 0
    while (pending or engine.has_work) and events < most_events:
        events += 1
        next_s = pending[-1].request.arrival_s if pending else math.inf
        if until_s is not None and until_s < next_s:
            engine.advance(until_s)
            until_s = engine.begin(until_s)
            continue
        engine.advance(next_s)
        engine.add(pending.pop(), next_s)
        until_s = engine.interrupt()
        if until_s is None:
            until_s = engine.begin(next_s)
    return engine
