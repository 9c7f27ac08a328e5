"""What lies in the host's memory while a checkpoint of several files is loaded, and what is told of it."""

from __future__ import annotations

import sys
import weakref
from pathlib import Path

import pytest
import torch

from nexusengine.config import parse_device
from nexusengine.execute.base import ExecutorOptions
from nexusengine.execute.torch_executor import TorchExecutor
from nexusengine.loading.resolve import resolve_model
from nexusengine.loading.safetensors_file import SafetensorsSource
from tests.support import checkpoints

FILES = 7
linux = pytest.mark.skipif(not sys.platform.startswith("linux"), reason="counts mappings in /proc")


def mapped(folder: Path) -> int:
    """Files of the folder that this process has mapped."""
    lines = Path("/proc/self/maps").read_text().splitlines()
    return len({line.split()[-1] for line in lines if str(folder) in line})


@pytest.fixture(params=["plain", "fp8 by block"])
def folder(request: pytest.FixtureRequest, tmp_path: Path) -> Path:
    if request.param == "plain":
        return checkpoints.write(tmp_path, checkpoints.plain(), files=FILES)
    tensors, _, quantization = checkpoints.fp8(request.param)
    return checkpoints.write(tmp_path, tensors, quantization, FILES)


@linux
@pytest.mark.parametrize("dtype", ["bfloat16", "float32"])
def test_at_most_two_files_are_mapped_and_one_tensor_of_them_is_held(
    folder: Path, dtype: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Also where the numbers need no conversion and could stay in the mapping."""
    most: list[int] = []
    held: list[weakref.ref[torch.Tensor]] = []
    read = SafetensorsSource.raw

    def watched(self: SafetensorsSource, name: str) -> torch.Tensor:
        alive = [r for r in held if r() is not None]
        assert len(alive) <= 1, "a tensor is still on the host when the next but one is read"
        tensor = read(self, name)
        held.append(weakref.ref(tensor))
        most.append(mapped(folder))
        return tensor

    monkeypatch.setattr(SafetensorsSource, "raw", watched)
    options = ExecutorOptions(dtype=dtype, kv_cache_bytes=2**22, max_running=8, max_batch_tokens=64)
    executor = TorchExecutor.create(resolve_model(str(folder)), parse_device("cpu"), options, lambda *_: None)
    assert max(most) == 2
    assert len(most) >= len(checkpoints.plain())
    assert mapped(folder) == 0
    executor.close()


def test_files_are_told_of_one_by_one(folder: Path) -> None:
    told: list[tuple[str, float]] = []
    options = ExecutorOptions(kv_cache_bytes=2**22, max_running=8, max_batch_tokens=64)
    TorchExecutor.create(
        resolve_model(str(folder)), parse_device("cpu"), options, lambda phase, fraction: told.append((phase, fraction))
    )
    loading = [(phase, fraction) for phase, fraction in told if phase.startswith("loading")]
    phases = list(dict.fromkeys(phase for phase, _ in loading))
    assert set(phases) <= {f"loading weights, file {i} of {FILES}" for i in range(1, FILES + 1)}
    assert phases == sorted(phases)
    assert len(phases) >= FILES - 2  # a weight in one of these tiny files may have its scale in the next
    assert phases[-1].endswith(f"{FILES} of {FILES}")
    fractions = [fraction for _, fraction in loading]
    assert fractions == sorted(fractions)


@linux
def test_a_file_that_is_needed_again_is_opened_again(folder: Path) -> None:
    """Whatever the order in which files hold the tensors, they are all read, and the same."""
    files = resolve_model(str(folder))
    also = () if files.config.stored is None else ("F8_E4M3",)
    first, again = SafetensorsSource(files.weights, also), SafetensorsSource(files.weights, also)
    names = sorted(first.names())
    there = {name: first.raw(name).clone() for name in names}
    first.close()
    assert mapped(folder) == 0
    for name in [*names[::3], *names[1::3], *names[2::3]]:
        assert torch.equal(again.raw(name).float(), there[name].float())
        assert mapped(folder) <= 2
    again.close()
    assert mapped(folder) == 0
