"""Building the kernels: once for several processes, and a sentence where it cannot be done."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest

from tests.conftest import runs

pytest.importorskip("torch")

from nexusengine.native import Library, NativeError, library, probe
from nexusengine.native import build as building

FAKE = """#!/bin/sh
if [ "$1" = --version ]; then echo "g++ (a fake) 1.0"; echo "Copyright Free Software Foundation"; exit 0; fi
echo called "$@" >>"$CALLS"
while [ $# -gt 0 ]; do if [ "$1" = -o ]; then sleep 0.2; echo made >"$2"; fi; shift; done
"""
CALLS = 5  # this machine's best instruction set in two units, interface, pool, link
MACHINE = os.uname().machine
X86 = "processor\t: 0\nflags\t\t: fpu sse2 avx2 fma f16c {}\n"
AVX512 = "avx512f avx512bw avx512dq avx512vl"


@pytest.fixture
def place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A cache folder of its own, and a compiler that only writes down that it was called."""
    compiler = tmp_path / "bin" / "g++"
    compiler.parent.mkdir()
    compiler.write_text(FAKE)
    compiler.chmod(0o755)
    monkeypatch.setenv("CXX", str(compiler))
    monkeypatch.setenv("CALLS", str(tmp_path / "calls"))
    monkeypatch.setenv("NEXUSENGINE_CACHE", str(tmp_path / "cache"))
    return tmp_path


def test_what_was_built_is_used_again(place: Path) -> None:
    first = building.build()
    assert first.read_text() == "made\n"
    assert building.build() == first
    assert (place / "calls").read_text().count("called") == CALLS


def test_two_processes_that_start_at_once_build_once(place: Path) -> None:
    code = "from nexusengine.native.build import build; print(build())"
    running = [subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, text=True) for _ in range(2)]
    said = {process.communicate(timeout=120)[0] for process in running}
    assert [process.returncode for process in running] == [0, 0]
    assert len(said) == 1
    assert (place / "calls").read_text().count("called") == CALLS


def test_other_sources_or_flags_are_another_library(place: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    first = building.build()
    monkeypatch.setattr(building, "FLAGS", (*building.FLAGS, "-g"))
    assert building.build() != first
    assert first.exists()


@pytest.mark.parametrize(
    ("machine", "cpuinfo", "best", "count"),
    [
        ("x86_64", X86.format(""), "avx2", 1),
        ("x86_64", X86.format(AVX512), "avx512", 2),
        ("x86_64", X86.format(AVX512 + " avx512_vnni"), "avx512vnni", 3),
        ("x86_64", X86.format(AVX512 + " avx512_bf16"), "avx512", 2),
        ("x86_64", X86.format(AVX512 + " avx512_vnni avx512_bf16"), "avx512bf16", 4),
        ("x86_64", "", "avx512bf16", 4),
        ("aarch64", "processor\t: 0\nFeatures\t: fp asimd\n", "neon", 1),
        ("aarch64", "processor\t: 0\nFeatures\t: fp asimd asimddp\n", "neondot", 2),
    ],
)
def test_the_processor_says_what_it_can_run(machine: str, cpuinfo: str, best: str, count: int) -> None:
    found = building.runnable(machine, cpuinfo)
    assert (found[0], len(found)) == (best, count)


def test_a_processor_without_kernels_is_refused_in_a_sentence() -> None:
    with pytest.raises(NativeError, match="none of the instruction sets"):
        building.runnable("x86_64", "flags : fpu sse2")
    with pytest.raises(NativeError, match="no kernels for riscv64; known: x86_64, aarch64"):
        building.runnable("riscv64", "")


@pytest.mark.skipif(MACHINE not in building.SETS, reason="there are no kernels for this machine")
def test_what_this_processor_says_is_what_the_compiled_library_finds() -> None:
    compiled = building.build(tuple(building.SETS[MACHINE])) if shutil.which("g++") else pytest.skip("there is no g++")
    assert Library(str(compiled)).isas == building.runnable()


def test_only_the_best_instruction_set_is_compiled_and_others_when_asked_for(place: Path) -> None:
    best, *others = building.runnable()
    first = building.build()
    assert building.build((best,)) == first
    assert f"NEX_ISA={best}" in (place / "calls").read_text()
    assert not any(f"NEX_ISA={other} " in (place / "calls").read_text() for other in others)
    for other in others:
        assert building.build((other,)) != first
        assert f"NEX_ISA={other}" in (place / "calls").read_text()
    with pytest.raises(NativeError, match=r"no kernels for the instruction set 'sse9' on \w+; known: \w+"):
        building.build(("sse9",))


def test_compiling_says_how_far_it_is(place: Path) -> None:
    seen: list[tuple[str, float]] = []
    building.build(progress=lambda phase, fraction: seen.append((phase, fraction)))
    assert {phase for phase, _ in seen} == {building.COMPILING}
    fractions = [fraction for _, fraction in seen]
    assert fractions == sorted(fractions)
    assert len(set(fractions)) == CALLS + 1
    assert (fractions[0], fractions[-1]) == (0.0, 1.0)
    seen.clear()
    building.build(progress=lambda phase, fraction: seen.append((phase, fraction)))
    assert seen == [], "nothing was compiled"


def test_a_packaged_library_is_used_if_it_is_of_these_sources(place: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(building, "PACKAGED", place / "lib")
    assert building.packaged() is None
    made = building.build_packaged(MACHINE, place / "lib")
    assert building.packaged() == made
    assert (place / "calls").read_text().count("called") == 2 * len(building.SETS[MACHINE]) + 3
    monkeypatch.setattr(building, "FLAGS", (*building.FLAGS, "-g"))
    assert building.packaged() is None, "made with other flags"
    other = next(name for name in building.SETS if name != MACHINE)
    assert building.packaged(other) is None


@pytest.mark.parametrize(
    ("script", "words"),
    [
        (None, "no C\\+\\+ compiler"),
        ("#!/bin/sh\necho clang version 19\n", "not GCC"),
        (FAKE.replace("echo called", "echo 'x.cpp:1: error: no such thing' >&2; exit 1; echo"), "error: no such thing"),
    ],
)
def test_a_build_that_cannot_be_says_why(place: Path, script: str | None, words: str) -> None:
    compiler = Path(os.environ["CXX"])
    compiler.unlink() if script is None else compiler.write_text(script)
    with pytest.raises(NativeError, match=words):
        building.build()
    left = [path for path in (place / "cache").rglob("*") if path.is_file() and path.suffix != ".lock"]
    assert left == [], "nothing half done stays"


def test_a_cache_folder_that_cannot_be_written_is_named(place: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (place / "file").write_text("")
    monkeypatch.setenv("NEXUSENGINE_CACHE", str(place / "file"))
    with pytest.raises(NativeError, match=r"cannot compile the kernels into .*file.*set NEXUSENGINE_CACHE"):
        building.build()


def test_the_kernels_can_be_switched_off(tmp_path: Path) -> None:
    code = "from nexusengine import native; print(native.probe())"
    environ = os.environ | {"NEXUSENGINE_NATIVE": "0"}
    done = subprocess.run([sys.executable, "-c", code], env=environ, capture_output=True, text=True, timeout=120)
    assert done.stdout == "(False, 'switched off by NEXUSENGINE_NATIVE=0')\n"


def test_an_instruction_set_that_cannot_run_here_is_refused() -> None:
    available, reason = probe()
    if not available:
        pytest.skip(reason)
    with pytest.raises(NativeError, match=r"'sse9' cannot run here; those that can: \w+"):
        library().use("sse9")


def compiles(process: psutil.Process) -> bool:
    try:
        return bool(process.name() == "cc1plus")
    except psutil.NoSuchProcess:  # a compiler driver's children come and go
        return False


@pytest.mark.skipif(shutil.which("g++") is None, reason="there is no g++")
def test_no_compiler_outlives_the_process_that_builds(tmp_path: Path) -> None:
    environ = {**os.environ, "NEXUSENGINE_CACHE": str(tmp_path)}
    code = "from nexusengine.native.build import build; build()"
    with subprocess.Popen([sys.executable, "-c", code], env=environ) as building_process:
        builder = psutil.Process(building_process.pid)
        until_s = time.monotonic() + 60
        compilers: list[psutil.Process] = []
        while not any(map(compiles, compilers)):
            assert time.monotonic() < until_s, "no compiler was seen"
            compilers = builder.children(recursive=True)
        builder.kill()
    until_s = time.monotonic() + 10.0
    while any(map(runs, compilers)):
        assert time.monotonic() < until_s, "a compiler still runs"
        time.sleep(0.02)


SLOW = """#!/bin/sh
if [ "$1" = --version ]; then echo "g++ (a fake) 1.0"; echo "Copyright Free Software Foundation"; exit 0; fi
echo called "$@" >>"$CALLS"
exec sleep 600
"""


def test_a_process_that_compiles_in_the_background_ends_when_it_wants_to(place: Path) -> None:
    """Its end used to wait for the compilers: Ctrl-C in the first seconds of `serve` took half a minute."""
    (place / "bin" / "g++").write_text(SLOW)
    code = (
        "import os, threading, time; from nexusengine.native.build import build;"
        "threading.Thread(target=build, daemon=True).start()\n"
        "while not os.path.exists(os.environ['CALLS']): time.sleep(0.01)"
    )
    subprocess.run([sys.executable, "-c", code], check=True, timeout=60)
    assert not [path for path in (place / "cache" / "native").glob("*/*") if path.name.startswith("tmp")]
