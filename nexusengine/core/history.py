"""What became of each request in the newest steps, for those who ask afterwards.

Only changes are kept: a request that waits for the same reason as a step before, or goes on decoding, costs nothing.
Rings of fixed size; numpy only, nothing per token.
"""

from __future__ import annotations

from collections import OrderedDict

import numpy as np
import numpy.typing as npt

from nexusengine.arrays import I4
from nexusengine.core.request import RequestState
from nexusengine.scheduler.plan import Reason
from nexusengine.types import FinishReason, Service
from nexusengine.wire import RequestChange, RequestRecord

_CHANGES = 1 << 16
_RECORDS = 4096


REASON_NAMES = tuple(reason.name.lower() for reason in Reason)
"""By number."""


def record_of(
    state: RequestState,
    service: Service,
    finished_s: float | None = None,
    finish_reason: FinishReason | None = None,
    error: str | None = None,
) -> RequestRecord:
    """The record of a request, as it is now or as it has ended."""
    request = state.request
    return RequestRecord(
        request_id=request.request_id,
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
    """Remembers changes and ended requests.

    Args:
        slots: of the core.
        changes: how many are remembered, of all requests together.
        records: how many ended requests are remembered.
    """

    def __init__(self, slots: int, *, changes: int = _CHANGES, records: int = _RECORDS) -> None:
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
        self._ended: OrderedDict[str, tuple[int, RequestRecord]] = OrderedDict()
        self._most_records = records

    def arrived(self, slot: int) -> int:
        """A request takes a slot; returns the number that it has here from now on."""
        serial = self._next_serial
        self._next_serial += 1
        self._serial[slot], self._reason[slot] = serial, Reason.NONE
        return serial

    def ended(self, slot: int, serial: int, record: RequestRecord) -> None:
        """The request in a slot has ended."""
        self._serial[slot], self._reason[slot] = -1, Reason.NONE
        self._ended.pop(record.request_id, None)  # an id may be used again
        self._ended[record.request_id] = serial, record
        if len(self._ended) > self._most_records:
            self._ended.popitem(last=False)

    def planned(self, step: int, at_s: float, reasons: npt.NDArray[np.int8], slots: I4, counts: I4) -> None:
        """A step is under way.

        Args:
            step, at_s: its number and the timestamp of its start.
            reasons: `[S]`, of the plan.
            slots, counts: `[R]`, rows that compute and how many tokens each.
        """
        chunks = slots[counts > 1]
        changed = reasons != self._reason
        changed[chunks] = True
        which = (changed & (self._serial >= 0)).nonzero()[0]
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

    def changes(self, serial: int) -> list[RequestChange]:
        """The changes of a request that are still remembered, oldest first."""
        order = np.arange(self._written - min(self._written, self._size), self._written) % self._size
        at = order[self._who[order] == serial]
        columns = zip(*(a[at].tolist() for a in (self._at_s, self._step, self._why, self._tokens)), strict=True)
        return [RequestChange(at_s, step, REASON_NAMES[why], tokens) for at_s, step, why, tokens in columns]

    def ended_record(self, request_id: str) -> tuple[int, RequestRecord] | None:
        """The number and the record of a request that has ended; None if it is not remembered."""
        return self._ended.get(request_id)
