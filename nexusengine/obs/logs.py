"""Logging of every process: plain lines on stderr."""

from __future__ import annotations

import logging
import time

from nexusengine.obs.console import Handler

_ROOT = "nexusengine"


def setup(level: str) -> None:
    logging.basicConfig(
        format="%(asctime)s %(levelname)s %(name)s: %(message)s", datefmt="%H:%M:%S", handlers=[Handler()]
    )
    logging.getLogger(_ROOT).setLevel(level.upper())


def get_logger(name: str) -> logging.Logger:
    return logging.getLogger(f"{_ROOT}.{name}")


class Sparse:
    """Logs warnings of which there may be very many: one every `period_s`, with the number of those left out."""

    def __init__(self, log: logging.Logger, period_s: float = 1.0) -> None:
        self._log, self._period_s = log, period_s
        self._left_out, self._logged_s = 0, float("-inf")

    def warning(self, message: str, *values: object) -> None:
        """A warning as of logging.Logger."""
        now = time.monotonic()
        if now - self._logged_s < self._period_s:
            self._left_out += 1
            return
        left_out = f" (and {self._left_out} like it since the last)" if self._left_out else ""
        self._log.warning(f"{message}{left_out}", *values)
        self._left_out, self._logged_s = 0, now
