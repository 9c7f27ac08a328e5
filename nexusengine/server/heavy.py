"""Work that takes long runs outside the event loop, and what takes much memory besides runs one at a time."""

from __future__ import annotations

import asyncio
import ctypes
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import ParamSpec, TypeVar

P = ParamSpec("P")
T = TypeVar("T")

SMALL = 16_384
LARGE = 2**20


class Heavy:
    """Runs functions in threads according to the size of their input in bytes or characters.

    Up to SMALL: at once. Up to LARGE: in asyncio's threads. Beyond: in a thread of its own, one after the other,
    because tokenising takes up to 130 bytes of memory a character; that memory is then given back to the system.
    """

    def __init__(self) -> None:
        self._one_at_a_time = ThreadPoolExecutor(1, "heavy")

    async def run(self, size: int, function: Callable[P, T], *args: P.args, **kwargs: P.kwargs) -> T:
        """The function's value. Raises what it raises."""
        if size <= SMALL:
            return function(*args, **kwargs)
        if size <= LARGE:
            return await asyncio.to_thread(function, *args, **kwargs)

        def work() -> T:
            try:
                return function(*args, **kwargs)
            finally:
                _give_memory_back()

        return await asyncio.get_running_loop().run_in_executor(self._one_at_a_time, work)


def _give_memory_back() -> None:
    """glibc keeps what was freed in a thread's arena; other C libraries have no such call and need none."""
    trim = getattr(ctypes.CDLL(None), "malloc_trim", None)
    if trim is not None:
        trim(0)
