"""Where the kernels come from: the library that the wheel carries, else one that is compiled here and kept.

Each instruction set has translation units with flags of its own. A wheel holds all those of its architecture, and the
best is chosen when it is loaded; here only the one that this processor runs best is compiled. The result is kept under
a name made of everything it depends on: sources, compiler, flags and instruction sets. It appears in the cache folder
whole or not at all, and of several processes that start at once one compiles and the others wait.
"""

from __future__ import annotations

import fcntl
import hashlib
import os
import platform
import shutil
import subprocess
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from nexusengine.cgroup import usable_cpus
from nexusengine.errors import ConfigError
from nexusengine.loading.cache import cache_dir
from nexusengine.process.parent_death import with_parent_death_signal

SOURCES = Path(__file__).parent / "src"
PACKAGED = Path(__file__).parent / "lib"
"""Where a wheel carries compiled kernels; see packaged()."""
FLAGS = (
    *("-std=c++17", "-O3", "-fPIC", "-fno-exceptions", "-fno-rtti", "-fvisibility=hidden", "-ffp-contract=fast"),
    # these two passes move loads out of the loops over registers and then spill the sums inside them
    *("-fno-gcse", "-fno-tree-pre"),
)
_AVX2 = ("-mavx2", "-mfma", "-mf16c")
_AVX512 = (*_AVX2, "-mavx512f", "-mavx512bw", "-mavx512dq", "-mavx512vl", "-mprefer-vector-width=512")
_VNNI = (*_AVX512, "-mavx512vnni")
SETS: dict[str, dict[str, tuple[str, ...]]] = {
    "x86_64": {"avx2": _AVX2, "avx512": _AVX512, "avx512vnni": _VNNI, "avx512bf16": (*_VNNI, "-mavx512bf16")},
    "aarch64": {"neon": (), "neondot": ("-march=armv8.2-a+dotprod",)},
}
"""Flags of each instruction set by machine; never -march=native, since a cache folder may be shared."""
NEEDS: dict[str, frozenset[str]] = {
    "avx2": (_avx2 := frozenset({"avx2", "fma", "f16c"})),
    "avx512": (_avx512 := _avx2 | {"avx512f", "avx512bw", "avx512dq", "avx512vl"}),
    "avx512vnni": (_vnni := _avx512 | {"avx512_vnni"}),
    "avx512bf16": _vnni | {"avx512_bf16"},
    "neon": frozenset(),
    "neondot": frozenset({"asimddp"}),
}
"""What a processor must have for each, in the kernel's words (flags or Features of /proc/cpuinfo)."""
COMMON = ("api", "pool")
"""Units that are compiled once, whatever the instruction sets."""
FOR_EACH = ("isa", "isa_attention")
"""Units that are compiled for each instruction set."""
_LONG = 20
"""How many times as long as another unit one of these takes, in round numbers."""
COMPILING = "compiling the CPU kernels"
"""The phase that is reported while it lasts."""
Progress = Callable[[str, float], None]
PORTABLE = ("-DNEX_OLD_GLIBC", "-s")
"""Flags of a library that is built for other machines than this one."""
_NAME = "libnexusengine.so"
_COMPILE_LIMIT_S = 300
_POLL_S = 0.02


class NativeError(Exception):
    """The kernels cannot be built or loaded here; the message says why in one sentence."""


@dataclass(frozen=True, slots=True)
class Compiler:
    """A C++ compiler and what it says of its version."""

    path: str
    version: str


def find_compiler() -> Compiler:
    """$CXX, else g++ or c++. It must be GCC, whose vector extensions the kernels use.

    Raises:
        NativeError: there is none.
    """
    wanted = os.environ.get("CXX")
    found = [path for name in ([wanted] if wanted else ["g++", "c++"]) if (path := shutil.which(name))]
    if not found:
        raise NativeError(f"there is no C++ compiler ({wanted or 'g++'}); on Debian and Ubuntu: apt install g++")
    for path in found:
        try:
            done = subprocess.run([path, "--version"], capture_output=True, text=True, timeout=30)
        except (OSError, subprocess.TimeoutExpired) as error:
            raise NativeError(f"the compiler {path} cannot be run: {error}") from None
        if done.returncode == 0 and "Free Software Foundation" in done.stdout:
            return Compiler(path, done.stdout.splitlines()[0])
    raise NativeError(f"the compiler {found[0]} is not GCC, which the kernels are built with; name one with CXX")


def packaged(machine: str | None = None) -> Path | None:
    """The library that was installed with this package, if it was made of these sources for this kind of machine."""
    machine = machine or platform.machine()
    path = PACKAGED / packaged_name(machine)
    return path if machine in SETS and path.is_file() else None


def packaged_name(machine: str) -> str:
    """A file name that changes with sources, flags and instruction sets."""
    return f"libnexusengine-{machine}-{_digest(FLAGS, SETS.get(machine))[:12]}.so"


def runnable(machine: str | None = None, cpuinfo: str | None = None) -> list[str]:
    """The instruction sets that this processor can run, the best first.

    Args:
        machine: the architecture, this one's by default.
        cpuinfo: the text of /proc/cpuinfo; where it does not say what the processor has, all sets are given.

    Raises:
        NativeError: there are none for this processor.
    """
    machine = machine or platform.machine()
    if machine not in SETS:
        raise NativeError(f"there are no kernels for {machine}; known: {', '.join(SETS)}")
    best_first = list(reversed(SETS[machine]))
    if cpuinfo is None:
        try:
            cpuinfo = Path("/proc/cpuinfo").read_text()
        except OSError:
            cpuinfo = ""
    line = next((line for line in cpuinfo.splitlines() if line.startswith(("flags", "Features"))), None)
    if line is None:
        return best_first
    has = set(line.partition(":")[2].split())
    found = [isa for isa in best_first if NEEDS[isa] <= has]
    if not found:
        raise NativeError("this processor has none of the instruction sets that there are kernels for")
    return found


def build(isas: Sequence[str] = (), progress: Progress = lambda phase, fraction: None) -> Path:
    """The library for this machine, compiled if it is not in the cache.

    Args:
        isas: the instruction sets in it, by default the one that this processor runs best.
        progress: called with a phase and the fraction done while it compiles.

    Raises:
        NativeError: it cannot be compiled.
    """
    known = SETS.get(platform.machine(), {})
    wanted = tuple(isas) or tuple(runnable()[:1])
    if unknown := [isa for isa in wanted if isa not in known]:
        raise NativeError(
            f"there are no kernels for the instruction set {unknown[0]!r} on {platform.machine()}; "
            f"known: {', '.join(reversed(known)) or 'none'}"
        )
    sets = {isa: flags for isa, flags in known.items() if isa in wanted}
    compiler = find_compiler()
    try:
        folder = cache_dir() / "native"
    except ConfigError as error:
        raise NativeError(error.message) from None
    target = folder / _digest(compiler, FLAGS, sets)[:20] / _NAME
    if target.is_file():
        return target
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        with _locked(folder / f"{target.parent.name}.lock"):
            if not target.is_file():
                _compile(compiler, sets, target, progress)
    except OSError as error:
        raise NativeError(
            f"cannot compile the kernels into {folder}: {error.strerror or error}; "
            "set NEXUSENGINE_CACHE to a folder that can be written"
        ) from None
    return target


def build_packaged(machine: str, folder: Path) -> Path:
    """Compile the library with every instruction set of a kind of machine, for a wheel.

    It is made in `folder` by $CXX, which may be a cross compiler.

    Raises:
        NativeError: it cannot be compiled.
    """
    if machine not in SETS:
        raise NativeError(f"there are no kernels for {machine}; known: {', '.join(SETS)}")
    folder.mkdir(parents=True, exist_ok=True)
    target = folder / packaged_name(machine)
    _compile(find_compiler(), SETS[machine], target, lambda phase, fraction: None, PORTABLE)
    return target


def _digest(*more: object) -> str:
    """A hash of the sources and whatever else the library depends on."""
    digest = hashlib.sha256()
    for path in sorted(SOURCES.iterdir()):
        digest.update(path.name.encode() + b"\0" + path.read_bytes())
    digest.update(repr(more).encode())
    return digest.hexdigest()


def _compile(
    compiler: Compiler,
    sets: dict[str, tuple[str, ...]],
    target: Path,
    progress: Progress,
    more_flags: tuple[str, ...] = (),
) -> None:
    progress(COMPILING, 0.0)
    with tempfile.TemporaryDirectory(dir=target.parent) as name:
        folder = Path(name)
        chosen = "-DNEX_SETS(X)=" + " ".join(f"X({isa})" for isa in reversed(sets))
        units = {unit: (SOURCES / f"{unit}.cpp", (chosen,)) for unit in COMMON} | {
            f"{unit}-{isa}": (SOURCES / f"{unit}.cpp", (f"-DNEX_ISA={isa}", *flags))
            for isa, flags in sets.items()
            for unit in FOR_EACH
        }
        commands = {
            unit: [compiler.path, *FLAGS, *more_flags, *flags, "-c", str(source), "-o", str(folder / f"{unit}.o")]
            for unit, (source, flags) in units.items()
        }
        weights = {unit: 1 if unit in COMMON else _LONG for unit in units}
        done, whole = 0, sum(weights.values()) + 1  # and linking
        for unit in _run(commands):
            done += weights[unit]
            progress(COMPILING, done / whole)
        objects = [str(folder / f"{unit}.o") for unit in units]
        link = [compiler.path, "-shared", "-pthread", *more_flags, *objects, "-o", str(folder / _NAME)]
        for _ in _run({"link": link}):
            pass
        os.replace(folder / _NAME, target)
    progress(COMPILING, 1.0)


def _run(commands: Mapping[str, list[str]]) -> Iterator[str]:
    """Run compilers, one for each processor at a time, and yield the name of each command that has ended.

    Without a pool of threads, which the interpreter would wait for at its end. Neither a compiler nor what it starts
    outlives this process.

    Raises:
        NativeError: a command failed.
    """
    waiting, running = dict(commands), dict[str, _Compiling]()
    until_s = time.monotonic() + _COMPILE_LIMIT_S
    try:
        while waiting or running:
            while waiting and len(running) < usable_cpus():
                name = next(iter(waiting))
                running[name] = _Compiling(waiting.pop(name))
            for name in [name for name, one in running.items() if one.ended()]:
                del running[name]
                yield name
            if time.monotonic() > until_s:
                raise NativeError(f"compiling the kernels took more than {_COMPILE_LIMIT_S} s")
            time.sleep(_POLL_S)
    finally:
        for one in running.values():
            one.kill()


class _Compiling:
    """A compiler that runs."""

    def __init__(self, command: list[str]) -> None:
        self._said = tempfile.TemporaryFile("w+", errors="replace")  # noqa: SIM115  (not a pipe: nobody reads it meanwhile)
        self._process = subprocess.Popen(
            with_parent_death_signal(*command, "-wrapper", ",".join(with_parent_death_signal(by_us=False))),
            stdin=subprocess.DEVNULL,
            stdout=subprocess.DEVNULL,
            stderr=self._said,
        )

    def ended(self) -> bool:
        """Raises NativeError if it failed."""
        status = self._process.poll()
        if not status:
            return status == 0
        self._said.seek(0)
        lines = self._said.read().splitlines()
        first = next((line for line in lines if "error" in line), lines[0] if lines else "?")
        raise NativeError(f"compiling the kernels failed: {first.strip()}")

    def kill(self) -> None:
        self._process.kill()
        self._process.wait()


@contextmanager
def _locked(path: Path) -> Iterator[None]:
    """Hold a lock that ends with the process.

    Raises:
        NativeError: it was not free within the time a build may take.
    """
    deadline_s = time.monotonic() + _COMPILE_LIMIT_S
    with path.open("w") as file:
        while True:
            try:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
                break
            except BlockingIOError:
                if time.monotonic() > deadline_s:
                    raise NativeError(f"another process holds {path} for more than {_COMPILE_LIMIT_S} s") from None
                time.sleep(0.05)
        yield
