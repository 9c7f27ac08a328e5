"""What gpu_check.py says of 8-bit products, rehearsed in the interpreter."""

from __future__ import annotations

import importlib
from pathlib import Path

import pytest
import torch

pytest.importorskip("triton")

from nexusengine.triton_kernels import launch

pytestmark = pytest.mark.skipif(not launch.interpreted(), reason="needs TRITON_INTERPRET=1")


def test_the_phase_of_8_bits_passes_and_tells_errors(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(str(Path(__file__).parents[2] / "scripts"))
    phase = importlib.import_module("gpu_phases.eight_bits")
    common = importlib.import_module("gpu_phases.common")
    with torch.inference_mode():
        found = phase.eight_bits(common.Setting(torch.device("cpu"), tiny=True))
    assert list(found) == [f"{kind} 256x128 at {tokens}" for kind in ("channel", "block") for tokens in (1, 17)]
    assert all(one["error"] < 0.01 for one in found.values())
