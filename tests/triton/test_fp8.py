"""8-bit floats in the interpreter: rounding as torch rounds, and products of quantised numbers against exact ones."""

from __future__ import annotations

import pytest
import torch

pytest.importorskip("triton")

from nexusengine.attention.base import AttentionMeta
from nexusengine.triton_kernels import fp8, launch, rope

pytestmark = pytest.mark.skipif(not launch.interpreted(), reason="needs TRITON_INTERPRET=1")
DTYPES = [torch.float32, torch.float16, torch.bfloat16]


def blown_up(scales: torch.Tensor, rows: int, columns: int) -> torch.Tensor:
    """`[rows, columns]`: each element's scale."""
    return scales.repeat_interleave(128, 0)[:rows].repeat_interleave(128, 1)[:, :columns]


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("group", [None, 128])
@pytest.mark.parametrize("width", [128, 300, 1024])
def test_a_group_s_largest_number_becomes_448_and_all_are_rounded_as_torch_rounds(
    width: int, group: int | None, dtype: torch.dtype
) -> None:
    torch.manual_seed(width)
    x = (torch.randn(5, width) * torch.exp2(torch.randint(-8, 4, (5, width)).float())).to(dtype)
    x[2] = 0.0
    found, scales = fp8.quantize(x, group)
    spread = scales.repeat_interleave(group or width, 1)[:, :width]
    expected = (x.float() / spread).clamp(-448, 448).to(torch.float8_e4m3fn)
    assert torch.equal(found.float(), expected.float())
    for columns, scale in zip(x.float().split(group or width, 1), scales.unbind(1), strict=True):
        assert torch.allclose(columns.abs().amax(1), scale * 448, atol=1e-9)


def test_ties_subnormal_and_too_large_numbers_are_stored_as_torch_stores_them() -> None:
    steps = torch.arange(-2000, 2000)
    x = torch.cat([steps * 2.0**-12, steps * 0.25, torch.tensor([1e4, -1e5, 464.0, 480.0])]).float().view(-1, 2, 2)
    cache = torch.zeros(2, len(x), 1, 2, 2, dtype=torch.float8_e4m3fn)
    rope.store(x, x, cache[0], cache[1], torch.arange(len(x)))
    expected = x.clamp(-448, 448).to(torch.float8_e4m3fn).float()
    assert torch.equal(cache[0].float().view(x.shape), expected)
    assert torch.equal(cache[1].float().view(x.shape), expected)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("tokens", "inputs", "outputs"), [(1, 128, 128), (3, 256, 384), (17, 300, 257), (70, 128, 40)])
@pytest.mark.parametrize("bias", [False, True])
def test_the_block_scaled_product(bias: bool, tokens: int, inputs: int, outputs: int, dtype: torch.dtype) -> None:
    """Exact for the numbers that it multiplies, and within the 8 bits' own error of the product of x itself."""
    torch.manual_seed(outputs)
    x = (3 * torch.randn(tokens, inputs)).to(dtype)
    weight = torch.randn(outputs, inputs).to(torch.float8_e4m3fn)
    scales = torch.rand(-(-outputs // 128), -(-inputs // 128)) + 0.5
    added = torch.randn(outputs).to(dtype) if bias else None
    found = fp8.block_linear(x, weight, scales, added).double()
    small, x_scales = fp8.quantize(x, 128)
    wide = weight.double() * blown_up(scales, outputs, inputs)
    rest = 0.0 if added is None else added.double()
    multiplied = (small.double() * x_scales.repeat_interleave(128, 1)[:, :inputs]) @ wide.t() + rest
    size = multiplied.abs().max()
    assert (found - multiplied).abs().max() <= size * {torch.float32: 1e-6}.get(dtype, 1e-2)
    assert (found - (x.double() @ wide.t() + rest)).abs().max() <= 0.05 * size


def test_rotation_writes_into_a_cache_of_8_bits_what_torch_would() -> None:
    torch.manual_seed(4)
    qkv, angles = torch.randn(9, 8 * 64), torch.rand(16, 32) * 6
    slots, positions = torch.randperm(32)[:9], torch.arange(9)
    slots[3] = -1
    one = torch.tensor([1], dtype=torch.int32)
    meta = AttentionMeta(one, one, one, slots, [1], [1], 1, 1, 1)
    caches = [torch.zeros(2, 8, 4, 2, 64, dtype=t) for t in (torch.float32, torch.float8_e4m3fn)]
    for cache in caches:
        rope.rotate_and_store(
            qkv.clone(), angles.cos(), angles.sin(), positions, meta.slot_mapping, cache[0], cache[1], (4, 2, 64)
        )
    exact, found = caches
    assert torch.equal(found.float(), exact.to(torch.float8_e4m3fn).float())
