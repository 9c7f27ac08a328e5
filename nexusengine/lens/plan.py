"""What a scheduler policy answers (contract 1 of the architecture)."""

from __future__ import annotations

import enum
from dataclasses import dataclass, field
from typing import Protocol

import numpy as np
import numpy.typing as npt

from nexusengine.lens.view import I4, EngineView


class Reason(enum.IntEnum):
    """Why a request does what it does in this step."""

    NONE = 0
    DECODE = 1
    PREFILL = 2
    ADMITTED = 3
    WAIT_TOKENS = 4  # the step's token budget or time limit is used up
    WAIT_BLOCKS = 5  # not enough free KV blocks
    WAIT_SEATS = 6  # max_running sequences run already
    WAIT_ORDER = 7  # others go first
    PREEMPTED = 8  # its KV was taken back; it is computed anew later
    RELEGATED = 9
    REFUSED = 10


@dataclass(frozen=True, slots=True)
class StepPlan:
    """How many tokens each request computes in the next step, and what becomes of the others.

    slots, counts `[R]`: rows that compute and how many tokens each (>= 1); decodes (count 1) come first. A waiting slot
    among them is admitted. Counting starts after the cached prefix for newcomers, else after `computed_tokens`.
    preempt: running slots whose KV is taken back before the step. relegate: slots put behind all others from now on.
    refuse: slots to fail with Overloaded. reasons `[S]`: by slot, for every slot in the view.
    predicted_s, upper_s: predicted duration of the step and its upper bound.
    """

    slots: I4
    counts: I4
    predicted_s: float
    upper_s: float
    reasons: npt.NDArray[np.int8]
    preempt: tuple[int, ...] = ()
    relegate: tuple[int, ...] = ()
    refuse: tuple[int, ...] = ()
    notes: dict[str, float] = field(default_factory=dict)


class SchedulerPolicy(Protocol):
    """A rule for what the next step computes. May keep private state (caches, hysteresis); must not read a clock."""

    name: str

    def plan(self, view: EngineView, now: float) -> StepPlan:
        """Never an empty plan while something can run. Blocks and tokens planned must fit the view's limits."""
        ...
