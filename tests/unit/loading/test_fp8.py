"""FP8 checkpoints as they are published, against the same weights in plain float32."""

from __future__ import annotations

import dataclasses
import logging
from pathlib import Path
from typing import Any

import pytest
import torch

from nexusengine.config import parse_device
from nexusengine.errors import ModelLoadError
from nexusengine.execute.base import ExecutorOptions
from nexusengine.execute.torch_executor import TorchExecutor
from nexusengine.layers.choice import choose_ops
from nexusengine.loading.config_json import parse_config
from nexusengine.loading.fp8 import Fp8Weight
from nexusengine.loading.resolve import resolve_model
from nexusengine.loading.weights import open_weights
from nexusengine.model_config import StoredWeights
from nexusengine.triton_kernels import launch
from tests.support import checkpoints
from tests.unit.execute.test_torch_executor import Steps, continued

OPTIONS = ExecutorOptions(kv_cache_bytes=2**22, max_running=8, max_batch_tokens=64)


def served(path: Path, **options: Any) -> TorchExecutor:
    files = resolve_model(str(path))
    return TorchExecutor.create(files, parse_device("cpu"), dataclasses.replace(OPTIONS, **options), lambda *_: None)


def text(executor: TorchExecutor, prompts: int = 3) -> list[list[int]]:
    steps = Steps(executor)
    return [continued(steps, slot, [slot + 3, 5, 8, 13], 12) for slot in range(prompts)]


@pytest.mark.parametrize("layout", checkpoints.FP8_LAYOUTS)
def test_every_tensor_is_the_number_it_stands_for(tmp_path: Path, layout: str) -> None:
    tensors, numbers, quantization = checkpoints.fp8(layout)
    files = resolve_model(str(checkpoints.write(tmp_path, tensors, quantization)))
    with open_weights(files) as source:
        assert source.names() == frozenset(numbers)
        for name, expected in numbers.items():
            assert torch.equal(source.get(name, torch.float32), expected)
            assert source.get(name, torch.bfloat16).dtype == torch.bfloat16
            stored = source.stored(name)
            assert (stored is not None) == (name.removesuffix(".weight") in checkpoints.projections())
            if isinstance(stored, Fp8Weight):
                assert stored.data.dtype == torch.float8_e4m3fn
                assert stored.block == ((128, 128) if "block" in layout else None)
                assert torch.equal(stored.numbers(torch.float32), expected)


@pytest.mark.parametrize("layout", checkpoints.FP8_LAYOUTS)
def test_where_nothing_multiplies_8_bits_the_text_is_that_of_the_dequantised_weights_and_the_log_says_so(
    tmp_path: Path, layout: str, caplog: pytest.LogCaptureFixture
) -> None:
    tensors, numbers, quantization = checkpoints.fp8(layout)
    with caplog.at_level(logging.INFO):
        found = served(checkpoints.write(tmp_path / "fp8", tensors, quantization))
    assert len([r for r in caplog.records if "stored with 8 bits are read as torch.float32" in r.getMessage()]) == 1
    expected = served(checkpoints.write(tmp_path / "plain", numbers))
    assert found.spec.weights_bytes == expected.spec.weights_bytes
    assert text(found) == text(expected)


@pytest.mark.parametrize(("capability", "kept"), [((8, 6), False), ((8, 9), True), ((9, 0), True), ((12, 0), True)])
def test_weights_stay_8_bits_where_the_gpu_multiplies_them(
    monkeypatch: pytest.MonkeyPatch, capability: tuple[int, int], kept: bool
) -> None:
    pytest.importorskip("triton")
    monkeypatch.setattr(launch, "probe", lambda device: (True, ""))
    monkeypatch.setattr(launch, "capability", lambda device: capability)
    ops = choose_ops(torch.device("cuda", 0), torch.bfloat16, 1e-5, stored=StoredWeights("fp8"))
    weight = Fp8Weight(torch.zeros(32, 64).to(torch.float8_e4m3fn), torch.ones(32, 1))
    assert (ops.name, ops.keeps_stored, ops.takes(weight)) == ("triton", kept, kept)
    odd = Fp8Weight(torch.zeros(30, 64).to(torch.float8_e4m3fn), torch.ones(30, 1))
    assert not ops.takes(odd)


def test_matrices_are_joined_by_rows_unless_one_ends_within_a_block() -> None:
    torch.manual_seed(1)

    def weight(n: int, block: tuple[int, int] | None) -> Fp8Weight:
        scale = torch.rand(-(-n // 128), 2) if block else torch.rand(n, 1)
        return Fp8Weight(torch.randn(n, 256).to(torch.float8_e4m3fn), scale, block)

    for block, sizes in ((None, (10, 30)), ((128, 128), (256, 128, 100))):
        parts = [weight(n, block) for n in sizes]
        joined = Fp8Weight.join(parts)
        assert joined is not None
        assert torch.equal(joined.numbers(torch.float32), torch.cat([p.numbers(torch.float32) for p in parts]))
        assert torch.equal(joined.scaled(4.0).numbers(torch.float32), 4 * joined.numbers(torch.float32))
    assert Fp8Weight.join([weight(100, (128, 128)), weight(128, (128, 128))]) is None
    assert Fp8Weight.join([weight(128, None), weight(128, (128, 128))]) is None


Q = "model.layers.0.self_attn.q_proj.weight"


@pytest.mark.parametrize(
    ("scale", "words"),
    [
        (None, f"tensor {Q} is stored as 8-bit floats, but {Q}_scale is missing"),
        (torch.ones(3), rf"tensor {Q}_scale_inv has the shape \[3\], which does not fit {Q} \[256, 256\] in blocks"),
        (torch.ones(2, 3), r"shape \[2, 3\]"),
    ],
)
def test_a_weight_without_a_scale_that_fits_is_an_error_that_names_both(
    tmp_path: Path, scale: torch.Tensor | None, words: str
) -> None:
    tensors, _, quantization = checkpoints.fp8("fp8 by block")
    del tensors[f"{Q}_scale_inv"]
    if scale is not None:
        tensors[f"{Q}_scale_inv"] = scale
    with pytest.raises(ModelLoadError, match=words):
        served(checkpoints.write(tmp_path, tensors, quantization))


@pytest.mark.parametrize(
    ("quantization", "words"),
    [
        ({"quant_method": "bitsandbytes"}, r"quantization_config \(bitsandbytes\) is not supported; read are fp8"),
        ({"quant_method": "fp8", "fmt": "e5m2"}, "fmt is 'e5m2'"),
        ({"quant_method": "fp8", "weight_block_size": [128]}, r"weight_block_size is \[128\]; two sizes"),
        ({"quant_method": "compressed-tensors"}, "0 ways of storing"),
        (checkpoints.compressed("group", num_bits=4, type="int"), "weights of type int with 4 bits by group"),
        ({"quant_method": "gptq", "bits": "4"}, r"\(gptq\): bits is '4'"),
    ],
)
def test_what_is_stored_otherwise_is_refused_by_name(quantization: dict[str, Any], words: str) -> None:
    with pytest.raises(ModelLoadError, match=words):
        parse_config(checkpoints.CONFIG | {"quantization_config": quantization}, "config.json")


@pytest.mark.parametrize(
    "names", [("self_attn.k_scale", "self_attn.v_scale"), ("self_attn.k_proj.output_scale", "self_attn.v_proj.v_scale")]
)
@pytest.mark.parametrize("layout", [None, "fp8 by block"])
def test_scales_of_k_and_v_change_what_lies_in_the_cache_and_nothing_else(
    tmp_path: Path, layout: str | None, names: tuple[str, str]
) -> None:
    """Powers of two only move the numbers in the cache; with numbers that fit, the text stays what it is without."""
    tensors, _, quantization = checkpoints.fp8(layout) if layout else (checkpoints.plain(), {}, None)
    scaled = dict(tensors)
    for i in range(2):
        scaled[f"model.layers.{i}.{names[0]}"] = torch.tensor(0.03 * (i + 1))
        scaled[f"model.layers.{i}.{names[1]}"] = torch.tensor([0.3])
    paths = [checkpoints.write(tmp_path / n, t, quantization) for n, t in (("a", tensors), ("b", scaled))]
    plain, divided = (served(path, fp8_kv=True) for path in paths)
    assert text(plain) == text(divided)
    for executor in (plain, divided):
        assert executor.spec.kv_dtype == "float8_e4m3fn"
    caches = [executor.kv for executor in (plain, divided) if executor.kv is not None]
    for which, scales in {"k": (2**-5, 2**-4), "v": (0.5, 0.5)}.items():
        for layer, scale in enumerate(scales):
            one, other = (cache["kv".index(which), layer, 1].float() for cache in caches)
            normal = one.isfinite() & (one.abs() > 2**-4) & (other.abs() > 2**-6)
            # numbers that are subnormal in one of the caches let the others differ by a rounding
            assert ((other / one)[normal] == 1 / scale).float().mean() > 0.9
    assert text(served(paths[1])) == text(served(paths[0]))


def test_a_scale_that_is_none_is_refused(tmp_path: Path) -> None:
    tensors = checkpoints.plain() | {"model.layers.1.self_attn.v_scale": torch.tensor(-1.0)}
    with pytest.raises(ModelLoadError, match=r"layers\.1\.self_attn\.v_scale is -1\.0"):
        served(checkpoints.write(tmp_path, tensors), fp8_kv=True)


def test_a_cache_of_8_bits_holds_four_times_as_many_tokens_as_one_of_float32(tmp_path: Path) -> None:
    path = checkpoints.write(tmp_path, checkpoints.plain())
    wide, narrow = (served(path, fp8_kv=fp8, kv_cache_bytes=2**19, max_running=64) for fp8 in (False, True))
    assert narrow.spec.num_blocks == 4 * wide.spec.num_blocks
    assert narrow.spec.kv_bytes == wide.spec.kv_bytes
    assert (wide.spec.kv_dtype, narrow.spec.kv_dtype) == ("", "float8_e4m3fn")
    assert narrow.spec.attention_backend == "sdpa"
