"""Ties an engine to the process that made it: it works only there, and its threads and processes end with it."""

from __future__ import annotations

import atexit
import os
from typing import NoReturn, Protocol

from nexusengine.errors import Unavailable


class Home:
    """The process that made an engine.

    Threads, locks, sockets and children of a process do not exist in a fork of it, so that an engine that was copied
    there would wait for ever.
    """

    def __init__(self) -> None:
        self._pid = os.getpid()

    @property
    def here(self) -> bool:
        return os.getpid() == self._pid

    def check(self) -> None:
        """Refuse use in a fork. Raises Unavailable in any process but the one that made the engine."""
        if not self.here:
            raise Unavailable(
                f"this engine was made in process {self._pid} and cannot be used in process {os.getpid()}, a fork of "
                "it; make an engine in that process"
            )


def not_pickled(engine: object) -> NoReturn:
    """Refuse to pickle an engine; for its `__reduce__`. Raises TypeError."""
    raise TypeError(
        f"{type(engine).__name__} cannot be pickled: it belongs to process {os.getpid()}; make one in the process that "
        "is to use it"
    )


class Running(Protocol):
    """Something with threads or processes of its own."""

    def end(self) -> None:
        """End it and wait for that; called at the exit of this process."""

    def forget(self) -> None:
        """Release what a fork of this process has inherited of it; called in the fork."""


_running: set[Running] = set()


def started(running: Running) -> None:
    """Register something to be ended with this process, unless `ended` is called before."""
    _running.add(running)


def ended(running: Running) -> None:
    """Take back `started`: it has ended by itself."""
    _running.discard(running)


@atexit.register
def _end_all() -> None:
    for running in list(_running):
        running.end()


def _forget_all() -> None:
    for running in _running:
        running.forget()
    _running.clear()


os.register_at_fork(after_in_child=_forget_all)
