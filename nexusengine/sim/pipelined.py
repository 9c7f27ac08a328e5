"""A simulated engine that plans one step ahead, as vLLM does with asynchronous scheduling.

While step k runs, step k + 1 is planned already. So a request that arrives during step k is computed in step k + 2 at
the earliest, and what a request that ended in step k held, its seat and its blocks, is free for step k + 2.
"""

from __future__ import annotations

from typing import Any

from nexusengine.sim.engine import SimEngine
from nexusengine.sim.job import Job


class PipelinedEngine(SimEngine):
    """`step_ended` is to be called instead of `begin`, with what arrived during the step."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self._leaving: list[int] = []
        self._let_go = False

    def next_step(self, arrived: list[Job], now: float) -> float | None:
        """Begin the next step, planned before `arrived` came; when it ends, or its run of like steps if nothing did."""
        until_s = None
        if len(self._running) > len(self._leaving):
            until_s = self.begin(now)
        self._let_go = True
        for slot in self._leaving:
            super()._leave(slot)
        self._leaving.clear()
        self._let_go = False
        for job in arrived:
            self.add(job, now)
        if until_s is None:
            return self.begin(now)
        return self.interrupt() if arrived or self._waiting else until_s

    def _leave(self, slot: int) -> None:
        """Ended rows keep seat and blocks, with nothing to compute, until the next step has been planned."""
        self._c.known_tokens[slot] = self._c.computed_tokens[slot]
        self._leaving.append(slot)
