"""What a scheduler policy answers (contract 1 of the architecture)."""

from __future__ import annotations

import enum
from dataclasses import dataclass, field
from typing import Protocol

import numpy as np
import numpy.typing as npt

from nexusengine.arrays import F8, I4
from nexusengine.scheduler.view import EngineView
from nexusengine.wire import PolicyTraits


class Reason(enum.IntEnum):
    """Why a request does what it does in this step."""

    NONE = 0
    DECODE = 1
    PREFILL = 2
    ADMITTED = 3
    WAIT_TOKENS = 4  # the step's token budget or time limit is used up
    WAIT_BLOCKS = 5  # not enough free KV blocks
    WAIT_RUNNING_SLOT = 6  # max_running sequences run already
    WAIT_ORDER = 7  # others go first
    PREEMPTED = 8  # its KV blocks were freed; it is computed anew later
    RELEGATED = 9  # its promise is lost; it waits behind those whose promise can be kept
    REFUSED = 10
    WAIT_TIME = 11  # more work would make this step longer than a running request's promise allows
    WAIT_TPOT = 12  # with it the decode step would come too near to the tightest promised time per token
    DEFERRED = 13  # serving it in its turn would make more requests late than leaving it for now
    AGED = 14  # waits far beyond its turn: computes in the share kept for such requests
    BACKFILL = 15  # relegated or deferred: computes in what the others left of the step
    WAIT_COALESCE = 16  # decodes run alone, so that a later step has the time for more prompts at once


@dataclass(frozen=True, slots=True)
class StepPlan:
    """How many tokens each request computes in the next step, and what becomes of the others.

    Attributes:
        slots, counts: `[R]`, rows that compute and how many tokens each (>= 1); decodes (count 1) come first. A waiting
            slot among them is admitted; its tokens are counted after the cached prefix, others' after
            `computed_tokens`.
        predicted_s, upper_s: predicted duration of the step and its upper bound.
        reasons: `[S]`, Reason by slot, for every slot in the view.
        preempt: running slots whose KV blocks are freed before the step.
        relegate, restore: slots that go after all others from now on, and that do so no longer.
        refuse: slots to fail with Overloaded.
        notes: numbers that explain the step, by name (see cli/history_text.py).
        due_s: `[S]`, timestamps by which prompts are to be done, where they are served by others than those of their
            SLOs; not to be kept.
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
    restore: tuple[int, ...] = ()
    due_s: F8 | None = None


class SchedulerPolicy(Protocol):
    """A rule for what the next step computes. May keep private state (caches, hysteresis); must not read a clock.

    Attributes:
        name: for people; whoever wants to know what it does reads its traits.
        traits: what the router and the clients may rely on.
    """

    name: str
    traits: PolicyTraits

    def plan(self, view: EngineView, now: float) -> StepPlan:
        """Never an empty plan while something can run. Blocks and tokens planned must fit the view's limits."""
        ...
