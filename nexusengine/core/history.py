"""What became of each request in the newest steps, for whoever asks afterwards.

Only changes are kept: a request that waits for the same reason as a step before, or goes on decoding, costs nothing.
Rings of fixed size; numpy only, nothing per token.
"""

from __future__ import annotations

from collections import OrderedDict
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from nexusengine.arrays import I4
from nexusengine.core.request import RequestState
from nexusengine.scheduler.plan import Reason
from nexusengine.types import SLO, FinishReason, Service, Timings

_CHANGES = 1 << 16
_LIVES = 4096


@dataclass(frozen=True, slots=True)
class Change:
    """From this step on: why the request does what it does, and how many tokens it computed in that step."""

    at_s: float
    step: int
    reason: Reason
    tokens: int


@dataclass(frozen=True, slots=True)
class Life:
    """A request that is known here, or was not long ago. finish_reason: None while it lives."""

    request_id: str
    serial: int
    prompt_tokens: int
    slo: SLO | None
    slo_class: str | None
    priority: int
    timings: Timings
    service: Service
    cached_tokens: int = 0
    preemptions: int = 0
    finish_reason: FinishReason | None = None
    error: str | None = None


def life_of(
    state: RequestState,
    service: Service,
    finished_s: float | None = None,
    finish_reason: FinishReason | None = None,
    error: str | None = None,
) -> Life:
    """Without its tokens."""
    request = state.request
    return Life(
        request_id=request.request_id,
        serial=state.serial,
        prompt_tokens=state.prompt_tokens,
        slo=request.slo,
        slo_class=request.slo_class,
        priority=request.priority,
        timings=state.timings(finished_s),
        service=service,
        cached_tokens=state.cached_tokens,
        preemptions=state.preemptions,
        finish_reason=finish_reason,
        error=error,
    )


class History:
    """slots: of the core. changes, lives: how many are remembered of all requests together."""

    def __init__(self, slots: int, *, changes: int = _CHANGES, lives: int = _LIVES) -> None:
        self._serial = np.full(slots, -1, np.int64)
        self._reason = np.zeros(slots, np.int8)  # as in the step before
        self._computed = np.zeros(slots, np.int32)
        self._next_serial = 0
        self._size, self._written = changes, 0
        self._who = np.full(changes, -1, np.int64)
        self._step = np.zeros(changes, np.int64)
        self._at_s = np.zeros(changes, np.float64)
        self._why = np.zeros(changes, np.int8)
        self._tokens = np.zeros(changes, np.int32)
        self._lives: OrderedDict[str, Life] = OrderedDict()
        self._most_lives = lives

    def arrived(self, slot: int) -> int:
        """A request takes a slot; the number it has here from now on."""
        serial = self._next_serial
        self._next_serial += 1
        self._serial[slot], self._reason[slot] = serial, Reason.NONE
        return serial

    def ended(self, slot: int, life: Life) -> None:
        self._serial[slot], self._reason[slot] = -1, Reason.NONE
        self._lives.pop(life.request_id, None)  # an id may be used again
        self._lives[life.request_id] = life
        if len(self._lives) > self._most_lives:
            self._lives.popitem(last=False)

    def planned(self, step: int, at_s: float, reasons: npt.NDArray[np.int8], slots: I4, counts: I4) -> None:
        """A step is under way. reasons `[S]`: of the plan; slots, counts `[R]`: what computes."""
        chunks = slots[counts > 1]
        changed = reasons != self._reason
        changed[chunks] = True
        which = np.flatnonzero(changed & (self._serial >= 0))
        self._reason[:] = reasons
        if not len(which):
            return
        self._computed[slots] = counts
        which = which[-self._size :]
        at = np.arange(self._written, self._written + len(which)) % self._size
        self._who[at], self._step[at], self._at_s[at] = self._serial[which], step, at_s
        self._why[at], self._tokens[at] = reasons[which], self._computed[which]
        self._computed[slots] = 0
        self._written += len(which)

    def changes(self, serial: int) -> list[Change]:
        """Those that are still remembered, oldest first."""
        order = np.arange(self._written - min(self._written, self._size), self._written) % self._size
        at = order[self._who[order] == serial]
        columns = (a[at].tolist() for a in (self._at_s, self._step, self._why, self._tokens))
        return [Change(at_s, step, Reason(why), tokens) for at_s, step, why, tokens in zip(*columns, strict=True)]

    def life(self, request_id: str) -> Life | None:
        """Of a request that has ended."""
        return self._lives.get(request_id)
