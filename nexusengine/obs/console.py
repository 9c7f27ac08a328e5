"""What a user sees on stderr: lines, and on a terminal one line of progress at its end that is written over.

Every process logs through here, so that a log line never lands on the end of an unfinished progress line.
"""

from __future__ import annotations

import logging
import sys
import threading

_lock = threading.Lock()
_unfinished = False


def on_terminal() -> bool:
    """Whether stderr is a terminal."""
    return sys.stderr.isatty()


def write_line(text: str) -> None:
    """Write a line of its own, below the progress line if there is one."""
    global _unfinished
    with _lock:
        sys.stderr.write(f"\n{text}\n" if _unfinished else f"{text}\n")
        sys.stderr.flush()
        _unfinished = False


def write_progress(text: str) -> None:
    """Write a line that the next call writes over; for terminals only."""
    global _unfinished
    with _lock:
        sys.stderr.write(f"\r{text}\x1b[K" if _unfinished else text)
        sys.stderr.flush()
        _unfinished = True


def end_progress() -> None:
    """Finish the progress line: what is written next begins on a line of its own."""
    global _unfinished
    with _lock:
        if _unfinished:
            sys.stderr.write("\n")
            sys.stderr.flush()
        _unfinished = False


class Handler(logging.Handler):
    """Logs to the console."""

    def emit(self, record: logging.LogRecord) -> None:
        try:
            write_line(self.format(record))
        except Exception:  # as every handler of the standard library does: a log line never ends what it is about
            self.handleError(record)
