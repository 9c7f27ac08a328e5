"""The two commands of the README, with an installation that only notes what it is asked to do."""

from __future__ import annotations

import shutil
import subprocess
from pathlib import Path

import pytest

from tests.conftest import ROOT

STAND_IN = '#!/usr/bin/env bash\necho "$(basename "$0") $*" >>"$(dirname "$0")/../../calls"\n'


@pytest.fixture
def checkout(tmp_path: Path) -> Path:
    """A checkout whose .venv holds stand-ins for every program."""
    shutil.copytree(ROOT / "scripts", tmp_path / "scripts")
    for name in ("pyproject.toml", "constraints.txt"):
        shutil.copy(ROOT / name, tmp_path)
    programs = tmp_path / ".venv" / "bin"
    programs.mkdir(parents=True)
    for name in ("python", "nexusengine", "ruff", "mypy", "lint-imports"):
        (programs / name).write_text(STAND_IN)
        (programs / name).chmod(0o755)
    return tmp_path


def calls(checkout: Path, script: str, *options: str) -> list[str]:
    """What the script called, in order."""
    (checkout / "calls").write_text("")
    done = subprocess.run([f"scripts/{script}", *options], cwd=checkout, capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stderr
    return (checkout / "calls").read_text().splitlines()


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


def test_test_installs_the_extra_once_and_hands_its_options_to_pytest(checkout: Path) -> None:
    first = calls(checkout, "test.sh", "-k", "router")
    assert first[1] == "python -m pip install --quiet -c constraints.txt -e .[test]"
    assert first[-1].endswith(" -k router")
    assert not any("pip" in call for call in calls(checkout, "test.sh"))
    assert calls(checkout, "serve.sh") == ["nexusengine serve"], "the tests' installation holds what serving needs"
