"""The phases of gpu_check.py that are about Triton kernels, rehearsed in the interpreter."""

from __future__ import annotations

import importlib
from pathlib import Path

import pytest
import torch

pytest.importorskip("triton")

from nexusengine.triton_kernels import launch

from .offline import need_scales_by_output

pytestmark = pytest.mark.skipif(not launch.interpreted(), reason="needs TRITON_INTERPRET=1")


def test_the_phase_of_8_bits_passes_and_tells_errors(monkeypatch: pytest.MonkeyPatch) -> None:
    need_scales_by_output()
    monkeypatch.syspath_prepend(str(Path(__file__).parents[2] / "scripts"))
    phase = importlib.import_module("gpu_phases.eight_bits")
    common = importlib.import_module("gpu_phases.common")
    with torch.inference_mode():
        found = phase.eight_bits(common.Setting(torch.device("cpu"), tiny=True))
    assert list(found) == [f"{kind} 256x128 at {tokens}" for kind in ("channel", "block") for tokens in (1, 17)]
    assert all(one["error"] < 0.01 for one in found.values())


def test_everything_that_is_compiled_beforehand_can_be_launched(monkeypatch: pytest.MonkeyPatch) -> None:
    """All parts but the models of 0.6B and 8B, which differ from the tiny one in their sizes alone."""
    monkeypatch.syspath_prepend(str(Path(__file__).parents[2] / "scripts"))
    precompile = importlib.import_module("gpu_phases.precompile")
    common = importlib.import_module("gpu_phases.common")
    at = common.Setting(torch.device("cpu"), tiny=True)
    parts = precompile.jobs(at)
    assert {"attention 32/8x128, decodes", "attention 8/1x256 8-bit K and V, prompts", "model 8B bfloat16"} <= set(
        parts
    )
    with torch.inference_mode():
        for name, launch_it in parts.items():
            if not name.startswith("model") and ("4/4x64" in name or "attention" not in name):
                launch_it()
        with pytest.raises(common.Skip, match="nothing is compiled"):
            precompile.precompile(at)


def test_the_processes_that_compile_tell_their_time_and_their_failures(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(str(Path(__file__).parents[2] / "scripts"))
    precompile = importlib.import_module("gpu_phases.precompile")
    common = importlib.import_module("gpu_phases.common")

    def broken() -> None:
        raise RuntimeError("out of shared memory")

    monkeypatch.setattr(precompile, "jobs", lambda at: {"one": lambda: None, "two": broken})
    monkeypatch.setattr(common.Setting, "sync", lambda at: None)
    with pytest.raises(common.CasesFailed, match=r"1 of 2 cases failed; two: .*out of shared memory") as caught:
        precompile.precompile(common.Setting(torch.device("cuda", 0), tiny=True))
    assert caught.value.found["one"] >= 0
