"""check.cpp: every kernel of every instruction set against double precision, under sanitizers and on emulated ARM."""

from __future__ import annotations

import platform
import shutil
import subprocess
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

pytest.importorskip("torch")

from nexusengine.native.build import FOR_EACH, SETS, SOURCES

CHECK = Path(__file__).parent / "check.cpp"
SANITIZERS = ("-O1", "-fsanitize=address,undefined", "-fno-sanitize-recover=undefined", "-DNEX_MOST_ROWS=3")


def built(folder: Path, compiler: str, sets: dict[str, tuple[str, ...]], flags: tuple[str, ...]) -> Path:
    """The check as a program, each instruction set compiled beside the others."""
    common = [compiler, "-std=c++17", "-w", "-pthread", *flags, f"-I{SOURCES}"]
    units = [
        [f"-DNEX_ISA={isa}", *extra, "-c", str(SOURCES / f"{unit}.cpp"), "-o", str(folder / f"{unit}-{isa}.o")]
        for isa, extra in sets.items()
        for unit in FOR_EACH
    ]
    units.append(["-DNEX_SETS(X)=" + " ".join(f"X({isa})" for isa in reversed(sets)), "-c", str(SOURCES / "api.cpp")])
    units[-1] += ["-o", str(folder / "api.o")]
    units.append(["-c", str(SOURCES / "pool.cpp"), "-o", str(folder / "pool.o")])
    units.append(["-c", str(CHECK), "-o", str(folder / "check.o")])
    with ThreadPoolExecutor(2) as pool:
        list(pool.map(lambda unit: subprocess.run([*common, *unit], check=True, timeout=800), units))
    program = folder / "check"
    each = [f"{unit}-{isa}" for isa in sets for unit in FOR_EACH]
    objects = [str(folder / f"{name}.o") for name in (*each, "api", "pool", "check")]
    subprocess.run([*common, *objects, "-o", str(program)], check=True, timeout=120)
    return program


@pytest.mark.timeout(1200)
def test_the_kernels_are_exact_and_touch_only_what_is_theirs(tmp_path: Path) -> None:
    compiler, sets = shutil.which("g++"), SETS.get(platform.machine())
    if compiler is None or sets is None:
        pytest.skip(f"no g++, or no kernels for {platform.machine()}")
    program = built(tmp_path, compiler, sets, SANITIZERS)
    said = []
    for threads in ("1", "2", "5"):
        done = subprocess.run([program, threads], capture_output=True, text=True, timeout=240)
        assert done.returncode == 0, done.stdout + done.stderr
        assert done.stdout.endswith(", 0 differences\n")
        said.append(done.stdout)
    assert len(set(said)) == 1, "results depend on the number of threads"


@pytest.mark.timeout(1200)
def test_the_kernels_are_exact_on_arm(tmp_path: Path) -> None:
    compiler, emulator = shutil.which("aarch64-linux-gnu-g++"), shutil.which("qemu-aarch64")
    if compiler is None or emulator is None:
        pytest.skip("no aarch64-linux-gnu-g++ or no qemu-aarch64 (Debian: g++-aarch64-linux-gnu, qemu-user)")
    program = built(tmp_path, compiler, SETS["aarch64"], ("-O1",))
    done = subprocess.run(
        [emulator, "-L", "/usr/aarch64-linux-gnu", program], capture_output=True, text=True, timeout=240
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert done.stdout.endswith("\n2 instruction sets, 0 differences\n")
