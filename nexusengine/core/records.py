"""A core's recent steps, and the history of one request, for those who ask."""

from __future__ import annotations

import itertools
from collections.abc import Sequence

from nexusengine.wire import (
    MAX_CHANGES_IN_REPLY,
    MAX_STEPS_IN_REPLY,
    RequestChange,
    RequestHistory,
    RequestRecord,
    StepRecord,
)


def newest_steps(steps: Sequence[StepRecord], last: int) -> tuple[StepRecord, ...]:
    """The newest `last` steps, oldest first; at most MAX_STEPS_IN_REPLY."""
    wanted = min(last, MAX_STEPS_IN_REPLY, len(steps))
    return tuple(itertools.islice(steps, len(steps) - wanted, None))


def request_history(
    record: RequestRecord, changes: Sequence[RequestChange], steps: Sequence[StepRecord], now: float
) -> RequestHistory:
    """Put together what is known of a request.

    Args:
        changes: all that are remembered, oldest first.
        steps: the newest of the core, successive.
        now: timestamp on the core's clock.
    """
    shown = changes[-MAX_CHANGES_IN_REPLY:]
    first = steps[0].step if steps else 0
    numbers = sorted({c.step for c in shown if 0 <= c.step - first < len(steps)})[-MAX_STEPS_IN_REPLY:]
    return RequestHistory(
        record=record,
        now_s=now,
        changes=tuple(shown),
        changes_left_off=len(changes) - len(shown),
        steps=tuple(steps[number - first] for number in numbers),
    )
