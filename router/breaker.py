"""Which of a worker's answers are its fault, and whether it gets requests after too many faults in a row. PURE.

Closed, it lets requests through. Open, it ejects the worker for a time. Half-open, it lets one through, the probe,
whose end decides.
"""

from __future__ import annotations

import enum

from nexusengine.errors import ERROR_TABLE, DeadlineExceeded, InternalError, Overloaded, Unavailable

FAULTS_TO_OPEN = 5
FIRST_OPEN_S, LONGEST_OPEN_S = 1.0, 30.0


class Answer(enum.Enum):
    """How a request ended at a worker, as far as it says something about the worker."""

    SUCCESS = enum.auto()
    BACKPRESSURE = enum.auto()
    FAULT = enum.auto()
    IGNORED = enum.auto()


def classify(error_code: str | None) -> Answer:
    """Classify the error that a request ended with, None if it ended well.

    4xx is the client's doing and a success of the worker; 429 and 503 say that it has too much to do, and a deadline
    that passed says nothing.
    """
    if error_code is None:
        return Answer.SUCCESS
    if error_code in (Overloaded.code, Unavailable.code):
        return Answer.BACKPRESSURE
    if error_code == DeadlineExceeded.code:
        return Answer.IGNORED
    status = ERROR_TABLE.get(error_code, InternalError).http_status
    return Answer.FAULT if status >= 500 else Answer.SUCCESS


class Breaker:
    """The circuit breaker of one worker process.

    Attributes:
        half_open: the next request is a probe.
        probing: the probe is under way.
    """

    def __init__(self) -> None:
        self._faults = 0
        self._open_until_s: float | None = None
        self._open_s = FIRST_OPEN_S
        self.half_open = False
        self.probing = False

    def ejected(self) -> str | None:
        """Why no request may go to the worker now; None if one may."""
        if self.half_open:
            return "its probe is under way" if self.probing else None
        return None if self._open_until_s is None else f"it failed {self._faults} requests in a row"

    def answered(self, answer: Answer, now: float, *, probe: bool = False) -> None:
        """Note that a request ended at the worker; probe: whether it was the probe."""
        if probe:
            self.probing = False
        if answer is Answer.SUCCESS and (probe or self._open_until_s is None):
            self._faults, self._open_s, self._open_until_s, self.half_open = 0, FIRST_OPEN_S, None, False
        elif answer is Answer.FAULT:
            self._faults += 1
            if probe or (self._faults >= FAULTS_TO_OPEN and self._open_until_s is None):
                self._open_s = min(2.0 * self._open_s, LONGEST_OPEN_S) if probe else FIRST_OPEN_S
                self._open_until_s, self.half_open = now + self._open_s, False

    def refresh(self, now: float) -> None:
        """Become half-open once the time is over."""
        if self._open_until_s is not None and now >= self._open_until_s:
            self.half_open = True
