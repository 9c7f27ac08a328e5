"""Programs that end with the thread that started them, by the kernel's parent-death signal."""

from __future__ import annotations

import ctypes
import os
import signal
import sys

_PR_SET_PDEATHSIG = 1


def set_parent_death_signal(number: int) -> None:
    """From now on the kernel sends this process signal `number` when the thread that spawned it ends."""
    ctypes.CDLL(None, use_errno=True).prctl(_PR_SET_PDEATHSIG, number)


def end_with_parent(parent_pid: int) -> None:
    """From now on the kernel kills this process when the thread that spawned it ends.

    Args:
        parent_pid: process of that thread; 0 for whatever it is.
    """
    set_parent_death_signal(signal.SIGKILL)
    if parent_pid not in (0, os.getppid()):  # it died before the signal was armed
        os._exit(1)


def with_parent_death_signal(*command: str, by_us: bool = True) -> list[str]:
    """The command line of a program that is not ours, changed so that it ends with the thread that runs it.

    Args:
        by_us: whether this process will run it, or a program that it started.
    """
    return [sys.executable, "-m", __name__, str(os.getpid() if by_us else 0), *command]


if __name__ == "__main__":
    end_with_parent(int(sys.argv[1]))
    os.execvp(sys.argv[2], sys.argv[2:])
