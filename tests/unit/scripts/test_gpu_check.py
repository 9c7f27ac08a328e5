"""scripts/gpu_check.py, rehearsed on the CPU."""

from __future__ import annotations

import importlib
import json
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

from nexusengine.profiles.fit import FEWEST_STEPS
from nexusengine.profiles.user_file import read_profile

pytestmark = pytest.mark.slow

ROOT = Path(__file__).parents[3]


def test_the_rehearsal_passes_every_phase_or_says_why_it_skips_one(tmp_path: Path) -> None:
    out = tmp_path / "out.json"
    command = [sys.executable, "scripts/gpu_check.py", "--device", "cpu", "--tiny", "--json", str(out)]
    ended = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=280)
    phases = json.loads(out.read_text())["phases"]
    assert ended.returncode == 0, ended.stdout + ended.stderr
    assert {name: p["result"] for name, p in phases.items()} == {
        "roofline": "pass", "kernels": "pass", "reference": "pass", "logits": "pass", "variants": "pass",
        "graphs": "skip", "eight_bits": "skip",
        "attention_speed": "pass", "performance_model": "pass", "end_to_end": "pass",
        "continuous_batching": "pass",
    }  # fmt: skip
    assert phases["variants"]["found"]["preempted"]["preemptions"] > 0
    assert phases["logits"]["found"]["tiny"]["kl"] <= 1e-6
    profile = read_profile(phases["performance_model"]["found"]["tiny"]["profile"]).file
    assert profile.device == "cpu"
    assert profile.steps >= FEWEST_STEPS
    beside = phases["continuous_batching"]["found"]
    assert beside["transformers_made"] == beside["users"] * beside["tokens_out"]


def test_phases_end_where_the_time_for_the_whole_check_does(tmp_path: Path) -> None:
    out = tmp_path / "out.json"
    command = [sys.executable, "scripts/gpu_check.py", "--device", "cpu", "--tiny", "--limit", "0", "--json", str(out)]
    ended = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=280)
    assert ended.returncode == 0, ended.stdout + ended.stderr
    assert {p["reason"] for p in json.loads(out.read_text())["phases"].values()} == {
        "the time for the whole check was over"
    }


def test_a_phase_that_does_not_end_is_broken_off_and_fails(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(str(ROOT / "scripts"))
    gpu_check = importlib.import_module("gpu_check")

    def endless(at: object) -> dict[str, object]:
        while True:
            try:
                time.sleep(60)
            except Exception:  # as a phase does that looks for failures
                continue

    monkeypatch.setitem(gpu_check.PHASES, "endless", (endless, 0.05))
    outcome = gpu_check.run_phase("endless", gpu_check.Setting(torch.device("cpu"), True), 60.0)
    assert outcome["result"] == "fail"
    assert "had not ended" in outcome["reason"]
