"""scripts/gpu_check.py, rehearsed on the CPU."""

from __future__ import annotations

import dataclasses
import importlib
import json
import os
import signal
import subprocess
import sys
import time
import zipfile
from pathlib import Path
from typing import Any

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
        "roofline": "pass", "precompile": "skip", "kernels": "pass", "reference": "pass", "logits": "pass",
        "variants": "pass",
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


def test_packages_that_are_missing_are_named_in_one_sentence(tmp_path: Path) -> None:
    (tmp_path / "msgspec.py").write_text("raise ImportError('there is no such module here')")
    command = [sys.executable, "scripts/gpu_check.py", "--device", "cpu", "--tiny", "--wheels", str(tmp_path)]
    environ = {**os.environ, "PYTHONPATH": str(tmp_path)}
    ended = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=280, env=environ)
    assert ended.returncode == 2, ended.stdout + ended.stderr
    assert ended.stderr.count("\n") == 1, ended.stderr
    assert "lacks msgspec (there is no such module here)" in ended.stderr
    assert f"there are no wheels in {tmp_path}" in ended.stderr
    assert "scripts/gpu_wheels.sh" in ended.stderr


def test_packages_are_found_in_a_folder_of_wheels_and_what_is_installed_goes_first(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    packages = phases("packages", monkeypatch)
    monkeypatch.setattr(sys, "path", [*sys.path])
    folder, into = tmp_path / "wheels", tmp_path / "unpacked"
    folder.mkdir()
    with zipfile.ZipFile(folder / "carried-1.0-py3-none-any.whl", "w") as archive:
        archive.writestr("carried_on_a_gpu_machine/__init__.py", "ANSWER = 42")
        archive.writestr("numpy/__init__.py", "raise RuntimeError('not the one that is installed')")
    needed = {"carried_on_a_gpu_machine": "carried", "numpy": "numpy", "nowhere_at_all": "nowhere"}
    assert list(packages.missing(needed)) == ["carried", "nowhere"]
    assert packages.unpack(folder, into) == ["carried-1.0-py3-none-any.whl"]
    lacking = packages.missing(needed)
    assert list(lacking) == ["nowhere"]
    assert f"the 1 wheels in {folder} do not have them" in packages.sentence(lacking, folder, ["one"])


def test_a_phase_that_does_not_end_is_killed_and_what_it_found_is_kept(monkeypatch: pytest.MonkeyPatch) -> None:
    apart, common = phases("apart", monkeypatch), phases("common", monkeypatch)

    def endless(at: Any) -> dict[str, object]:
        at.tell({"first case": 1})
        while True:
            try:
                time.sleep(60)
            except Exception:  # as a phase does that looks for failures
                continue

    outcome = apart.run_phase(endless, common.Setting(torch.device("cpu"), True), 0.25, 60.0)
    assert outcome["result"] == "fail"
    assert "had not ended" in outcome["reason"]
    assert outcome["found"] == {"first case": 1}


def test_a_phase_whose_process_dies_fails_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    apart, common = phases("apart", monkeypatch), phases("common", monkeypatch)
    at = common.Setting(torch.device("cpu"), True)

    def crashes(at: Any) -> dict[str, object]:
        at.tell({"first case": 1})
        os.kill(os.getpid(), signal.SIGKILL)
        return {}

    def leaves(at: object) -> dict[str, object]:
        os._exit(3)

    outcome = apart.run_phase(crashes, at, 60.0, 60.0)
    assert (outcome["result"], outcome["reason"]) == ("fail", "its process ended with signal SIGKILL")
    assert outcome["found"] == {"first case": 1}
    assert apart.run_phase(leaves, at, 60.0, 60.0)["reason"] == "its process ended with status 3"
    here = os.getpid()
    outcome = apart.run_phase(lambda at: {"apart": os.getpid() != here}, at, 60.0, 60.0)
    assert (outcome["result"], outcome["found"]) == ("pass", {"apart": True})


def test_a_phase_that_failed_on_a_gpu_runs_once_more_with_launches_that_are_waited_for(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """The device is not touched: neither phase does, and the machine is told, not asked."""
    table, gpu_check = phases("table", monkeypatch), importlib.import_module("gpu_check")
    monkeypatch.delenv("CUDA_LAUNCH_BLOCKING", raising=False)
    monkeypatch.setattr(table, "about", lambda at: {"available": True, "device": "a GPU", "doctor": {}})

    def broken(at: object) -> dict[str, object]:
        raise ValueError(f"blocking: {os.environ.get('CUDA_LAUNCH_BLOCKING')}")

    monkeypatch.setattr(table, "PHASES", {"broken": (broken, 9.0), "fine": (lambda at: {}, 9.0)})
    out = tmp_path / "out.json"
    assert gpu_check.main(["--json", str(out)]) == 1
    outcomes = json.loads(out.read_text())["phases"]
    assert outcomes["broken"]["reason"] == "ValueError: blocking: None"
    assert outcomes["broken"]["again"]["reason"] == "ValueError: blocking: 1"
    assert outcomes["fine"]["result"] == "pass"
    assert "again" not in outcomes["fine"]


def test_a_case_that_fails_is_recorded_and_the_others_go_on(monkeypatch: pytest.MonkeyPatch) -> None:
    apart, common = phases("apart", monkeypatch), phases("common", monkeypatch)

    def fails(words: str, kind: type[Exception]) -> object:
        raise kind(words)

    def phase(at: Any) -> object:
        cases = common.Cases(at)
        cases.run("fine", lambda: 0.5)
        cases.run("off", lambda: fails("off by 2, more than 1", AssertionError))
        cases.run("raises", lambda: fails("an illegal memory access", RuntimeError))
        cases.run("elsewhere", lambda: fails("needs a CUDA device", common.Skip))
        cases.run("last", lambda: 0.25)
        return cases.end()

    outcome = apart.run_phase(phase, common.Setting(torch.device("cpu"), True), 60.0, 60.0)
    assert outcome["result"] == "fail"
    assert outcome["reason"] == "2 of 5 cases failed; off: failed: off by 2, more than 1"
    assert outcome["found"] == {
        "fine": 0.5,
        "off": "failed: off by 2, more than 1",
        "raises": "failed: RuntimeError: an illegal memory access",
        "elsewhere": "skipped: needs a CUDA device",
        "last": 0.25,
    }
    assert "more than 1" in outcome["trace"]


def test_the_shape_that_matters_most_is_checked_first_and_a_loose_limit_is_one_backend_s_alone(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    attention = phases("attention", monkeypatch)
    assert attention.SHAPES[0] == (32, 8, 128)
    fp8, bf16 = torch.float8_e4m3fn, torch.bfloat16
    assert attention.limit_of("flash3", bf16, fp8) == 0.2
    assert {attention.limit_of(name, bf16, fp8) for name in ("flash2", "triton", "flashinfer", "sdpa")} == {0.03}
    assert attention.limit_of("flash3", bf16, None) == 0.03
    assert attention.limit_of("sdpa", torch.float32, None) == 1e-4


def test_on_a_gpu_the_cpu_kernels_are_neither_built_nor_looked_for(monkeypatch: pytest.MonkeyPatch) -> None:
    table, common = phases("table", monkeypatch), phases("common", monkeypatch)

    def refused() -> tuple[bool, str]:
        raise AssertionError("the CPU kernels are built")

    monkeypatch.setattr("nexusengine.native.probe", refused)
    monkeypatch.setattr("nexusengine.attention.native_cpu.probe", refused)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device=None: "a GPU")
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device=None: (9, 0))
    found = table.about(common.Setting(torch.device("cuda", 0), False))
    assert found["device"] == "a GPU"
    assert found["doctor"]["cpu"]["kernels_reason"] == "not looked at"


def test_a_decode_step_reads_the_embeddings_only_where_they_are_the_head_too(monkeypatch: pytest.MonkeyPatch) -> None:
    common = phases("common", monkeypatch)
    config = common.LARGE
    everything = 2 * config.num_parameters
    table = 2 * config.vocab_size * config.hidden_size
    assert everything - common.bytes_read(config, everything, 2) == table
    assert table / everything == pytest.approx(0.065, abs=0.005)
    tied = dataclasses.replace(config, tie_embeddings=True)
    assert common.bytes_read(tied, everything - table, 2) == everything - table


def test_the_process_that_forks_the_phases_touches_no_cuda() -> None:
    """Else none of them could use it."""
    code = (
        "import sys, torch\n"
        "def refused(*given): raise AssertionError('CUDA was touched')\n"
        "for owner, name in ((torch._C, '_cuda_getDeviceCount'), (torch._C, '_cuda_init'), (torch.cuda, '_lazy_init'),"
        " (torch.cuda, 'is_available'), (torch.cuda, 'get_device_capability')):\n"
        "    setattr(owner, name, refused)\n"
        "sys.path.insert(0, 'scripts')\n"
        "import gpu_check\n"
        "from gpu_phases import table\n"
        "table.about = lambda at: {'available': True, 'device': 'a GPU', 'doctor': {}}\n"
        "table.PHASES = {'none': (lambda at: {}, 9.0)}\n"
        "sys.exit(gpu_check.main([]))\n"
    )
    ended = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, timeout=280)
    assert ended.returncode == 0, ended.stdout + ended.stderr
    assert ended.stdout.startswith("pass  none")


def phases(name: str, monkeypatch: pytest.MonkeyPatch) -> Any:
    """A module of scripts/gpu_phases."""
    monkeypatch.syspath_prepend(str(ROOT / "scripts"))
    return importlib.import_module(f"gpu_phases.{name}")
