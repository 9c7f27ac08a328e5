"""Loading the kernels and choosing the instruction set.

NEXUSENGINE_NATIVE=0 switches them off. NEXUSENGINE_NATIVE_ISA=avx2 (say) takes another instruction set than the best,
and NEXUSENGINE_NATIVE_ISA=all compiles all that run here, which tests switch between.
"""

from __future__ import annotations

import contextlib
import ctypes
import os
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from ctypes import c_char_p, c_int, c_int64, c_void_p

from nexusengine.native import structs
from nexusengine.native.build import NativeError, Progress, build, packaged, runnable

ABI = 3
_loaded: Library | NativeError | None = None
_loading = threading.Lock()


class Library:
    """The kernels as functions; see src/kernels.h and src/api.cpp.

    Pointers are those of contiguous CPU tensors that the caller keeps alive.

    Attributes:
        isa: the instruction set in use.
        isas: all that run here, best first.
    """

    def __init__(self, path: str, isa: str | None = None) -> None:
        """Load it.

        Raises:
            NativeError: it cannot be loaded, or `isa` cannot run here.
        """
        try:
            self._dll = dll = ctypes.CDLL(path)
        except OSError as error:
            raise NativeError(f"{path} cannot be loaded: {error}") from None
        if dll.nex_abi() != ABI:
            raise NativeError(f"{path} has interface {dll.nex_abi()}, not {ABI}")
        dll.nex_available.argtypes, dll.nex_available.restype = [c_int], c_char_p
        self.isas: list[str] = []
        while (name := dll.nex_available(len(self.isas))) is not None:
            self.isas.append(name.decode())
        if not self.isas:
            raise NativeError("this processor has none of the instruction sets that there are kernels for")
        dll.nex_choose.argtypes = [c_char_p]
        dll.nex_set_threads.argtypes, dll.nex_set_threads.restype = [c_int], None
        self._run = dll.nex_run
        self._run.argtypes, self._run.restype = [c_void_p, c_int64], None
        self._local = threading.local()
        self.use(isa or self.isas[0])

    def use(self, isa: str) -> None:
        """Take this instruction set from now on, in the whole process.

        Raises:
            NativeError: it cannot run here.
        """
        if not self._dll.nex_choose(isa.encode()):
            raise NativeError(f"instruction set {isa!r} cannot run here; those that can: {', '.join(self.isas)}")
        self.isa = isa

    def set_threads(self, count: int) -> None:
        """Threads of every later call in the process."""
        self._dll.nex_set_threads(count)

    def run(self, one: Prepared) -> None:
        """Compute now; while this thread records, keep a copy of the call instead."""
        recorded: list[ctypes.Structure] | None = getattr(self._local, "recorded", None)
        if recorded is None:
            self._run(one.address, 1)
        else:
            recorded.append(type(one.arguments).from_buffer_copy(one.arguments))

    def replay(self, calls: Calls) -> None:
        """Compute what was recorded, in its order. What its pointers name must be there still."""
        self._run(calls.address, calls.count)

    @contextmanager
    def recording(self) -> Iterator[list[ctypes.Structure]]:
        """Within the block, collect the arguments of every call of this thread as they are, and compute nothing."""
        recorded: list[ctypes.Structure] = []
        self._local.recorded = recorded
        try:
            yield recorded
        finally:
            self._local.recorded = None


class Prepared:
    """A call whose arguments are filled in from time to time, and run."""

    def __init__(self, arguments: ctypes.Structure) -> None:
        self.arguments = arguments
        self._call = structs.Call(ctypes.addressof(arguments), structs.KINDS[type(arguments)])
        self.address = ctypes.addressof(self._call)


class Calls:
    """Recorded calls, to be replayed at once."""

    def __init__(self, recorded: list[ctypes.Structure]) -> None:
        self._recorded = recorded
        self.count = len(recorded)
        each = (structs.Call(ctypes.addressof(one), structs.KINDS[type(one)]) for one in recorded)
        self._calls = (structs.Call * self.count)(*each)
        self.address = ctypes.addressof(self._calls)


def library(progress: Progress = lambda phase, fraction: None) -> Library:
    """The library of this process, found or compiled, and loaded, at the first call.

    Args:
        progress: see build().

    Raises:
        NativeError: it cannot be had; the same error every time.
    """
    global _loaded
    with _loading:
        if _loaded is None:
            try:
                _loaded = _load(progress)
            except NativeError as error:
                _loaded = error
    if isinstance(_loaded, NativeError):
        raise _loaded
    return _loaded


def _load(progress: Progress) -> Library:
    if os.environ.get("NEXUSENGINE_NATIVE") == "0":
        raise NativeError("switched off by NEXUSENGINE_NATIVE=0")
    return Library(str(packaged() or build(_wanted_isas(), progress)), _wanted_isa())


def _wanted_isas() -> list[str]:
    """The ones to compile; none: the best there is."""
    wanted = os.environ.get("NEXUSENGINE_NATIVE_ISA", "")
    return runnable() if wanted == "all" else [wanted] if wanted else []


def _wanted_isa() -> str | None:
    """The one to compute with; None: the best there is."""
    wanted = os.environ.get("NEXUSENGINE_NATIVE_ISA", "")
    return None if wanted in ("", "all") else wanted


def prepare(progress: Progress = lambda phase, fraction: None) -> None:
    """Compile the library into the cache folder, for a process that starts later.

    Only if it is neither there nor in the package. Whatever fails is left for that process to say.
    """
    if os.environ.get("NEXUSENGINE_NATIVE") == "0" or packaged() is not None:
        return
    with contextlib.suppress(NativeError):
        build(_wanted_isas(), progress)


def loaded() -> Library | None:
    """The library if this process uses it already; nothing is built or loaded."""
    return _loaded if isinstance(_loaded, Library) else None


def probe() -> tuple[bool, str]:
    """(usable here, with which instruction set or why not). Never raises."""
    try:
        found = library()
    except NativeError as error:
        return False, str(error)
    return True, f"instruction set {found.isa}"
