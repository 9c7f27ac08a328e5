"""The two commands of the README, with an installation that only notes what it is asked to do."""

from __future__ import annotations

import os
import pty
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

from tests.conftest import ROOT

STAND_IN = """#!/usr/bin/env bash
echo "$(basename "$0") $*" >>"$(dirname "$0")/../../calls"
case "$*" in *+cpu*) if [ -n "${NO_CPU_BUILD:-}" ]; then echo "ERROR: no such version" >&2; exit 1; fi ;; esac
"""
INSTALL = "python -m pip install --quiet -c constraints.txt"


@pytest.fixture
def checkout(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A checkout whose .venv holds stand-ins for every program, on a machine with an NVIDIA driver."""
    (tmp_path / "driver").write_text("")
    monkeypatch.setenv("NVIDIA_DRIVER", str(tmp_path / "driver"))
    monkeypatch.delenv("TORCH_INDEX", raising=False)
    shutil.copytree(ROOT / "scripts", tmp_path / "scripts")
    for name in ("pyproject.toml", "constraints.txt"):
        shutil.copy(ROOT / name, tmp_path)
    programs = tmp_path / ".venv" / "bin"
    programs.mkdir(parents=True)
    for name in ("python", "nexusengine", "ruff", "mypy", "lint-imports"):
        (programs / name).write_text(STAND_IN)
        (programs / name).chmod(0o755)
    return tmp_path


def run(checkout: Path, script: str, *options: str) -> subprocess.CompletedProcess[str]:
    (checkout / "calls").write_text("")
    return subprocess.run([f"scripts/{script}", *options], cwd=checkout, capture_output=True, text=True, timeout=60)


def called(checkout: Path) -> list[str]:
    return (checkout / "calls").read_text().splitlines()


def calls(checkout: Path, script: str, *options: str) -> list[str]:
    """What the script called, in order."""
    done = run(checkout, script, *options)
    assert done.returncode == 0, done.stderr
    return called(checkout)


def without_driver(checkout: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (checkout / "driver").unlink()
    programs = checkout / "programs"
    programs.mkdir()
    for name in ("bash", "env", "cat", "cksum", "tr", "dirname", "basename", "tail"):
        (programs / name).symlink_to(shutil.which(name) or "")
    monkeypatch.setenv("PATH", str(programs))  # no nvidia-smi
    monkeypatch.setenv("PYTHON", sys.executable)


def test_without_a_driver_torchs_cpu_build_is_taken(checkout: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    without_driver(checkout, monkeypatch)
    assert calls(checkout, "serve.sh")[:2] == [f"{INSTALL} torch==2.13.0+cpu", f"{INSTALL} -e ."]


def test_without_a_cpu_build_the_other_is_taken_and_named(checkout: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    without_driver(checkout, monkeypatch)
    monkeypatch.setenv("NO_CPU_BUILD", "1")
    done = run(checkout, "serve.sh")
    assert done.returncode == 0
    assert called(checkout)[:2] == [f"{INSTALL} torch==2.13.0+cpu", f"{INSTALL} torch==2.13.0"]
    assert "a CUDA build of some gigabytes); set TORCH_INDEX to avoid it" in done.stderr


def test_an_index_for_torch_is_used_for_it_alone(checkout: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    without_driver(checkout, monkeypatch)
    monkeypatch.setenv("TORCH_INDEX", "file:///cpu")
    expected = [f"{INSTALL} --extra-index-url file:///cpu torch==2.13.0+cpu", f"{INSTALL} -e ."]
    assert calls(checkout, "serve.sh")[:2] == expected
    (checkout / ".venv" / ".nexusengine-base").unlink()
    monkeypatch.setenv("NO_CPU_BUILD", "1")
    done = run(checkout, "serve.sh")
    assert done.returncode != 0
    assert "TORCH_INDEX has no CPU build of torch 2.13.0" in done.stderr
    assert called(checkout) == expected[:1], "no gigabytes are fetched that were not asked for"


def test_serve_installs_once_and_hands_its_options_to_nexusengine(checkout: Path) -> None:
    options = ("--model", "llama-3-8b", "--port", "8001")
    first = calls(checkout, "serve.sh", *options)
    assert first == [
        "python -m pip install --quiet -c constraints.txt torch==2.13.0",
        "python -m pip install --quiet -c constraints.txt -e .",
        "nexusengine serve --model llama-3-8b --port 8001",
    ]
    assert calls(checkout, "serve.sh") == ["nexusengine serve"]
    (checkout / "constraints.txt").write_text("numpy==2.0.0\n")
    assert len(calls(checkout, "serve.sh", *options)) == 3, "other versions are asked for"


def test_on_a_terminal_pip_shows_its_progress(checkout: Path) -> None:
    (checkout / "calls").write_text("")
    ours, theirs = pty.openpty()
    try:
        subprocess.run(["scripts/serve.sh"], cwd=checkout, stdout=theirs, stderr=theirs, check=True, timeout=60)
    finally:
        os.close(ours)
        os.close(theirs)
    install = INSTALL.replace(" --quiet", "")
    assert called(checkout)[:2] == [f"{install} torch==2.13.0", f"{install} -e ."]


def test_test_installs_the_extra_once_and_hands_its_options_to_pytest(checkout: Path) -> None:
    first = calls(checkout, "test.sh", "-k", "router")
    assert first[1] == "python -m pip install --quiet -c constraints.txt -e .[test]"
    assert first[-1].endswith(" -k router")
    assert not any("pip" in call for call in calls(checkout, "test.sh"))
    assert calls(checkout, "serve.sh") == ["nexusengine serve"], "the tests' installation holds what serving needs"


def test_no_version_is_asked_for_that_a_cuda_build_of_torch_has_another_of() -> None:
    """Else nothing can be installed where the CUDA build is taken: torch 2.13.0 asks for triton 3.7.1."""
    pinned = {line.partition("==")[0].lower() for line in (ROOT / "constraints.txt").read_text().splitlines()}
    assert not {name for name in pinned if name == "triton" or name.startswith(("nvidia-c", "cuda-"))}


@pytest.mark.parametrize("platform", [None, "manylinux_2_28_x86_64"])
def test_a_wheel_with_kernels_is_for_one_platform(tmp_path: Path, platform: str | None) -> None:
    """Built in an environment that is there, from a package of one file."""
    for name in ("pyproject.toml", "setup.py", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, tmp_path)
    lib = tmp_path / "nexusengine" / "native" / "lib"
    lib.mkdir(parents=True)
    for folder in (lib.parent.parent, lib.parent):
        (folder / "__init__.py").write_text("")
    (lib / "kernels.so").write_text("")
    code = "from setuptools.build_meta import build_wheel; print(build_wheel('.'))"
    environ = {**os.environ, "NEXUSENGINE_PLATFORM": platform or ""}
    done = subprocess.run([sys.executable, "-c", code], cwd=tmp_path, env=environ, capture_output=True, text=True)
    if "No module named 'setuptools'" in done.stderr or "bdist_wheel" in done.stderr:
        pytest.skip("this environment has no setuptools that builds wheels")
    name = done.stdout.splitlines()[-1]
    assert name == f"nexusengine-0.1.0-py3-none-{platform or 'any'}.whl", done.stderr
    with zipfile.ZipFile(tmp_path / name) as wheel:
        assert "nexusengine/native/lib/kernels.so" in wheel.namelist()
        metadata = wheel.read("nexusengine-0.1.0.dist-info/WHEEL").decode()
    assert f"Root-Is-Purelib: {'false' if platform else 'true'}" in metadata
