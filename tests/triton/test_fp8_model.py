"""An FP8 checkpoint in the interpreter: its weights stay 8-bit floats, and its logits are those of their numbers."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

pytest.importorskip("triton")

from nexusengine.attention.registry import backend_class
from nexusengine.layers.basic import Linear
from nexusengine.layers.fp8 import Fp8Linear
from nexusengine.layers.ops import Ops, TorchOps
from nexusengine.layers.triton_ops import TritonOps
from nexusengine.loading.fp8 import Fp8Weight
from nexusengine.loading.resolve import resolve_model
from nexusengine.loading.weights import open_weights
from nexusengine.models.llama import LlamaForCausalLM
from nexusengine.models.loader import WeightLoader
from nexusengine.triton_kernels import fp8, launch
from tests.support import checkpoints
from tests.support.attention_cases import make_case

from .offline import need_scales_by_output
from .test_attention_kernels import spec

pytestmark = pytest.mark.skipif(not launch.interpreted(), reason="needs TRITON_INTERPRET=1")


def loaded(path: Path, ops: Ops[Any], dtype: torch.dtype) -> LlamaForCausalLM:
    files = resolve_model(str(path))
    with open_weights(files) as source:
        loader = WeightLoader(files.config, source, dtype=dtype, device=torch.device("cpu"), ops=ops)
        return LlamaForCausalLM(loader, max_positions=64)


class RoundedOps(TorchOps):
    """The oracle: plain torch in float32, on activations that were rounded to 8 bits by token or by group."""

    def __init__(self, group: int) -> None:
        super().__init__(1e-5)
        self._group = group

    def linear(self, to: Linear, x: torch.Tensor, norm: torch.Tensor | None = None) -> torch.Tensor:
        return to(self._rounded(x if norm is None else self.norm(x, norm)))

    def add_linear(self, to: Linear, x: torch.Tensor, into: torch.Tensor) -> torch.Tensor:
        return into + to(self._rounded(x))

    def _rounded(self, x: torch.Tensor) -> torch.Tensor:
        parts = []
        for part in x.split(self._group, dim=1):
            scale = part.abs().amax(1, keepdim=True).clamp_min(1e-12) / 448
            parts.append((part / scale).clamp(-448, 448).to(torch.float8_e4m3fn).float() * scale)
        return torch.cat(parts, dim=1)


def logits(model: LlamaForCausalLM, kept: torch.dtype, backend: str = "triton") -> torch.Tensor:
    dtype = model.norm.dtype
    wanted = replace(spec((4, 2), 64, dtype), kv_dtype=None if kept == dtype else kept)
    meta = make_case(spec((4, 2), 64), [(1, 1), (19, 19)]).meta
    attention = backend_class(backend)(wanted)
    kv = torch.zeros(2, 2, 8, 16, 2, 64, dtype=kept)
    ids, positions = torch.arange(20) * 7 % 89, torch.tensor([0, *range(19)])
    with torch.inference_mode():
        attention.plan(meta)
        return model.logits(model.forward(ids, positions, kv, attention, meta))


def distance(found: torch.Tensor, expected: torch.Tensor) -> float:
    return float((found.float() - expected.float()).norm() / expected.float().norm())


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("layout", checkpoints.FP8_LAYOUTS)
def test_weights_stay_as_they_are_stored_and_logits_are_those_of_rounded_activations(
    tmp_path: Path, layout: str, dtype: torch.dtype
) -> None:
    """Products by channel come in bfloat16, whatever the model's type."""
    if "block" not in layout:
        need_scales_by_output()
    tensors, numbers, quantization = checkpoints.fp8(layout)
    kept = loaded(checkpoints.write(tmp_path / "fp8", tensors, quantization), TritonOps(1e-5, fp8=True), dtype)
    for layer in kept.layers:
        for linear in (layer.qkv, layer.output, layer.gate_up, layer.down):
            assert isinstance(linear, Fp8Linear)
            assert linear.weight.dtype == torch.float8_e4m3fn
            assert linear.blocks == ("block" in layout)
    assert kept.weights.unkept == []
    assert type(kept.head) is not Fp8Linear
    assert kept.weights.total_bytes < 0.6 * 2 * sum(t.numel() for t in numbers.values())
    path = checkpoints.write(tmp_path / "plain", numbers)
    rounded = logits(loaded(path, RoundedOps(128 if "block" in layout else 4096), torch.float32), torch.float32)
    plain = logits(loaded(path, TorchOps(1e-5), torch.float32), torch.float32)
    found = logits(kept, dtype)
    if dtype == torch.float32 and "block" in layout:
        assert distance(found, rounded) < 0.01  # elsewhere bfloat16 decides differently what is rounded up or down
    assert distance(found, rounded) < 0.2
    assert distance(found, plain) < 0.2  # seven maps a layer, each with a noise of a fortieth


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("bias", [False, True])
def test_a_map_by_channel_is_the_product_of_its_numbers(bias: bool, dtype: torch.dtype) -> None:
    """torch's own product, as on a GPU; up to the rounding to bfloat16 in which it comes."""
    need_scales_by_output()
    torch.manual_seed(3)
    x, added = torch.randn(5, 96).to(dtype), torch.randn(48).to(dtype) if bias else None
    weight = Fp8Weight(torch.randn(48, 96).to(torch.float8_e4m3fn), torch.rand(48, 1) + 0.5)
    ops = TritonOps(1e-5, fp8=True)
    assert ops.takes(weight)
    assert not ops.takes(weight, head=True)
    small, scales = fp8.quantize(x)
    exact = (small.float() * scales) @ weight.numbers(torch.float32).t() + (0.0 if added is None else added.float())
    packed = ops.pack(weight, added)
    into = torch.randn(5, 48).to(dtype)
    for found, expected in (
        (ops.linear(packed, x), exact),
        (ops.add_linear(packed, x, into.clone()), into.float() + exact),
    ):
        assert found.dtype == dtype
        assert (found.float() - expected).abs().max() <= 2**-6 * exact.abs().max()
    with pytest.raises(TypeError, match="keeps no Fp8Weight"):
        TorchOps(1e-5).pack(weight)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_cache_of_8_bits_gives_the_logits_that_torch_gives_over_such_a_cache(
    tmp_path: Path, dtype: torch.dtype
) -> None:
    path = checkpoints.write(tmp_path, checkpoints.plain())
    expected = logits(loaded(path, TorchOps(1e-5), torch.float32), torch.float8_e4m3fn, "sdpa")
    found = logits(loaded(path, TritonOps(1e-5), dtype), torch.float8_e4m3fn)
    assert distance(found, expected) < (0.01 if dtype == torch.float32 else 0.1)
    assert distance(found, logits(loaded(path, TorchOps(1e-5), torch.float32), torch.float32)) < 0.15


def test_maps_whose_shapes_have_no_product_are_dequantised_and_named(tmp_path: Path) -> None:
    """Blocks of 64 have none."""
    tensors, numbers, quantization = checkpoints.fp8("fp8 by block")
    for name in checkpoints.projections():
        scale = tensors[f"{name}.weight_scale_inv"]
        tensors[f"{name}.weight_scale_inv"] = scale.repeat_interleave(2, 0).repeat_interleave(2, 1)
    path = checkpoints.write(tmp_path, tensors, quantization | {"weight_block_size": [64, 64]})
    model = loaded(path, TritonOps(1e-5, fp8=True), torch.float32)
    assert model.weights.unkept == checkpoints.projections()
    expected = numbers["model.layers.0.self_attn.o_proj.weight"]
    output = model.layers[0].output
    assert isinstance(output, Linear)
    assert torch.equal(output.weight, expected)
