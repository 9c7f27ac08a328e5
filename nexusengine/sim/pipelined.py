"""A simulated engine that plans one step ahead, as vLLM does with asynchronous scheduling.

While step k runs, step k + 1 is planned already. So a request that arrives during step k is computed in step k + 2 at
the earliest, and what a request that ended in step k held, its running slot and its blocks, is free for step k + 2.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from nexusengine.arrays import I4
from nexusengine.perf.registry import make_model
from nexusengine.profiles.base import DeviceProfile
from nexusengine.scheduler.plan import SchedulerPolicy
from nexusengine.sim.engine import EngineSettings, SimEngine, SimRequest
from nexusengine.sim.job import Job


class PipelinedEngine(SimEngine):
    """An engine whose steps are begun by `next_step` and ended by `ends_at`, so that engines can step together.

    Args:
        ahead: plan one step ahead; otherwise each step is planned when it begins.
    """

    def __init__(
        self,
        profile: DeviceProfile,
        policy: SchedulerPolicy,
        settings: EngineSettings,
        *,
        max_model_len: int,
        ahead: bool,
    ) -> None:
        super().__init__(
            profile, policy, make_model("line"), settings, max_model_len=max_model_len, rng=np.random.default_rng(0)
        )
        self._every_step, self._ahead = True, ahead
        self._leaving: list[tuple[SimRequest, int, bool]] = []  # output tokens, complete

    def next_step(self, arrived: Sequence[Job], now: float) -> tuple[I4, I4] | None:
        """Begin a step at the end of the one before, when `arrived` are taken in.

        Returns:
            Its counts and contexts, row by row; None if there is nothing to do.
        """
        if not self._ahead:
            self._let_go()
            self._add_all(arrived, now)
            self.begin(now)
        else:
            if self.running > len(self._leaving):
                self.begin(now)  # planned before they came, with the slots of those that have just ended taken
            self._let_go()
            self._add_all(arrived, now)
            if self._run is None:  # nothing could be planned ahead, so the device is idle and this is planned now
                self.begin(now)
        return None if self._run is None else (self._run.counts, self._run.starts)

    def ends_at(self, at_s: float) -> None:
        """When the step under way ends."""
        run = self._run
        assert run is not None
        run.took_s, run.ends_s = np.array([at_s - run.began_s]), np.array([at_s])

    def _add_all(self, jobs: Sequence[Job], now: float) -> None:
        for job in jobs:
            self.add(job, now)

    def _let_go(self) -> None:
        leaving, self._leaving = self._leaving, []
        for request, output_tokens, complete in leaving:
            super()._leave(request, output_tokens=output_tokens, complete=complete)

    def _leave(self, request: SimRequest, *, output_tokens: int, complete: bool = False) -> None:
        """Rows that have ended keep slot and blocks, with nothing to compute, until the next step has been planned."""
        columns = self.scheduler.columns
        columns.known_tokens[request.slot] = columns.computed_tokens[request.slot]
        self._leaving.append((request, output_tokens, complete))
