"""Building the kernels: each instruction set in a translation unit with its own flags, the choice made at run time.

The result is kept under a name made of everything it depends on: sources, compiler and flags. It appears in the cache
folder whole or not at all, and of several processes that start at once one builds and the others wait.
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
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from nexusengine.child import tied
from nexusengine.loading.cache import cache_dir

SOURCES = Path(__file__).parent / "src"
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
COMMON = ("api", "pool")
"""Units that are the same for every instruction set."""
_NAME = "libnexusengine.so"
_COMPILE_LIMIT_S = 300


class NativeError(Exception):
    """The kernels cannot be built or loaded here; the message says why in one sentence."""


@dataclass(frozen=True, slots=True)
class Compiler:
    """A C++ compiler and what it says of its version."""

    path: str
    version: str


def find_compiler() -> Compiler:
    """$CXX, else g++ or c++. It must be GCC, whose vector extensions the kernels use. Raises NativeError."""
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


def build() -> Path:
    """The library for this machine, built if it is not in the cache. Raises NativeError."""
    sets = SETS.get(platform.machine())
    if sets is None:
        raise NativeError(f"there are no kernels for {platform.machine()}; known: {', '.join(SETS)}")
    compiler = find_compiler()
    folder = cache_dir() / "native"
    target = folder / _key(compiler, sets) / _NAME
    if target.is_file():
        return target
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        with _locked(folder / f"{target.parent.name}.lock"):
            if not target.is_file():
                _compile(compiler, sets, target)
    except OSError as error:
        raise NativeError(f"cannot build in {folder}: {error}") from None
    return target


def _key(compiler: Compiler, sets: dict[str, tuple[str, ...]]) -> str:
    digest = hashlib.sha256()
    for path in sorted(SOURCES.iterdir()):
        digest.update(path.name.encode() + b"\0" + path.read_bytes())
    digest.update(repr((compiler, FLAGS, sets)).encode())
    return digest.hexdigest()[:20]


def _compile(compiler: Compiler, sets: dict[str, tuple[str, ...]], target: Path) -> None:
    with tempfile.TemporaryDirectory(dir=target.parent) as name:
        folder = Path(name)
        units = {unit: (SOURCES / f"{unit}.cpp", ()) for unit in COMMON} | {
            isa: (SOURCES / "isa.cpp", (f"-DNEX_ISA={isa}", *flags)) for isa, flags in sets.items()
        }
        commands = [
            [compiler.path, *FLAGS, *flags, "-c", str(source), "-o", str(folder / f"{unit}.o")]
            for unit, (source, flags) in units.items()
        ]
        with ThreadPoolExecutor(min(len(commands), os.cpu_count() or 1)) as pool:
            list(pool.map(_run, commands))
        objects = [str(folder / f"{unit}.o") for unit in units]
        _run([compiler.path, "-shared", "-pthread", *objects, "-o", str(folder / _NAME)])
        os.replace(folder / _NAME, target)


def _run(command: list[str]) -> None:
    """Neither the compiler nor what it starts outlives this process."""
    tied_command = tied(*command, "-wrapper", ",".join(tied(by_us=False)))
    try:
        done = subprocess.run(tied_command, capture_output=True, text=True, timeout=_COMPILE_LIMIT_S)
    except subprocess.TimeoutExpired:
        raise NativeError(f"compiling the kernels took more than {_COMPILE_LIMIT_S} s") from None
    if done.returncode != 0:
        errors = [line for line in done.stderr.splitlines() if "error" in line] or done.stderr.splitlines() or ["?"]
        raise NativeError(f"compiling the kernels failed: {errors[0].strip()}")


@contextmanager
def _locked(path: Path) -> Iterator[None]:
    """Holds a lock that ends with the process. Raises NativeError after the time a build may take."""
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
