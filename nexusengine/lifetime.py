"""What ties an engine to its process: it is of use only there, and what runs for it ends with the process, quietly."""

from __future__ import annotations

import atexit
import os
from typing import NoReturn, Protocol

from nexusengine.errors import Unavailable


class Home:
    """The process that made an engine. Threads, locks, sockets and children of a process do not live on in a fork of
    it, so that an engine that was copied there would wait for ever."""

    def __init__(self) -> None:
        self._pid = os.getpid()

    @property
    def here(self) -> bool:
        return os.getpid() == self._pid

    def check(self) -> None:
        """Raises Unavailable in any other process."""
        if not self.here:
            raise Unavailable(
                f"this engine was made in process {self._pid} and cannot be used in process {os.getpid()}, a fork of "
                "it; make an engine in that process"
            )


def not_pickled(engine: object) -> NoReturn:
    """For `__reduce__`: raises TypeError."""
    raise TypeError(
        f"{type(engine).__name__} cannot be pickled: it belongs to process {os.getpid()}; make one in the process that "
        "is to use it"
    )


class Running(Protocol):
    """Something with threads or processes of its own."""

    def end(self) -> None:
        """See it to its end, at the exit of this process."""

    def forget(self) -> None:
        """Let go of what a fork of this process has inherited of it; called in the fork."""


_running: set[Running] = set()


def started(running: Running) -> None:
    """From now on it is ended with the process, unless `ended` is called before."""
    _running.add(running)


def ended(running: Running) -> None:
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
