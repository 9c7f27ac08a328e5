"""pool_check.cpp: the threads that share out tasks, also under the thread sanitizer."""

from __future__ import annotations

import shutil
import subprocess
from pathlib import Path

import pytest

pytest.importorskip("torch")

from nexusengine.native.build import SOURCES

CHECK = Path(__file__).parent / "pool_check.cpp"


def run_check(folder: Path, flags: tuple[str, ...], arguments: tuple[str, ...]) -> subprocess.CompletedProcess[str]:
    compiler = shutil.which("g++")
    if compiler is None:
        pytest.skip("no g++")
    program = folder / "pool_check"
    sources = [str(CHECK), str(SOURCES / "pool.cpp")]
    command = [compiler, "-std=c++17", "-w", "-pthread", *flags, f"-I{SOURCES}", *sources, "-o", str(program)]
    made = subprocess.run(command, capture_output=True, text=True, timeout=300)
    if "cannot find" in made.stderr and "tsan" in made.stderr:
        pytest.skip("the compiler has no thread sanitizer")
    assert made.returncode == 0, made.stderr
    return subprocess.run([program, *arguments], capture_output=True, text=True, timeout=300)


@pytest.mark.timeout(600)
def test_every_task_is_done_once_whoever_asks_and_after_a_fork(tmp_path: Path) -> None:
    done = run_check(tmp_path, ("-O2",), ("fork",))
    assert (done.returncode, done.stdout) == (0, "0 failures\n"), done.stderr


@pytest.mark.timeout(600)
def test_the_pool_has_no_data_race(tmp_path: Path) -> None:
    done = run_check(tmp_path, ("-O1", "-fsanitize=thread"), ())
    if "FATAL: ThreadSanitizer" in done.stderr:
        pytest.skip(f"the thread sanitizer cannot run here: {done.stderr.splitlines()[0]}")
    assert (done.returncode, done.stdout) == (0, "0 failures\n"), done.stderr
