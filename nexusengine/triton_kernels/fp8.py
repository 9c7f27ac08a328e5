"""8-bit floats (float8_e4m3fn): rounding, activations quantised by token or by group, and a product by blocks.

The product is with a weight that has a scale for each block of 128 x 128 (as DeepSeek-V3 has them, arXiv 2412.19437,
section 3.3). Needs compute capability 8.9. A weight with a scale for each output goes through torch._scaled_mm instead.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from nexusengine.triton_kernels import launch as launching

LARGEST = 448.0
"""The largest number of float8_e4m3fn, which has no infinity."""
BLOCK = 128
"""Rows and columns of a weight that share a scale, and columns of an activation that do."""
_INTERPRETED = tl.constexpr(launching.interpreted())


@triton.jit
def to_fp8(x):
    """float32 x, rounded to the nearest, ties to even; what is too large becomes the largest.

    The interpreter cuts off instead of rounding, so that it is given what needs no rounding.
    """
    x = tl.minimum(tl.maximum(x, -448.0), 448.0)
    if _INTERPRETED:
        bits = x.to(tl.uint32, bitcast=True)
        kept = (bits + 0x7FFFF + ((bits >> 20) & 1)) & 0xFFF00000  # three bits of mantissa
        small = (x * 512.0 + 12582912.0) - 12582912.0  # below 2**-6 they lie 2**-9 apart
        x = tl.where(tl.abs(x) < 0.015625, small / 512.0, kept.to(tl.float32, bitcast=True))
    return x.to(tl.float8e4nv)


@triton.jit(do_not_specialize=["groups"])
def _quantize_kernel(x, out, scales, x_stride, width, groups, GROUP: tl.constexpr, PADDED: tl.constexpr):
    """A program: GROUP columns of one row."""
    row, group = tl.program_id(0).to(tl.int64), tl.program_id(1)
    within = tl.arange(0, PADDED)
    columns = group * GROUP + within
    there = (within < GROUP) & (columns < width)
    wide = tl.load(x + row * x_stride + columns, mask=there, other=0.0).to(tl.float32)
    scale = tl.maximum(tl.max(tl.abs(wide), 0), 1e-12) / 448.0
    tl.store(out + row * width + columns, to_fp8(wide / scale), mask=there)
    tl.store(scales + row * groups + group, scale)


@triton.jit
def _product(a, w):
    """a w in float32, of 8-bit floats; the interpreter knows no such product."""
    if _INTERPRETED:
        return tl.dot(a.to(tl.float32), w.to(tl.float32))
    return tl.dot(a, w)


@triton.jit(do_not_specialize=["tokens"])
def _block_linear_kernel(
    x, x_scales, weight, w_scales, bias, out, tokens, outputs, inputs, groups,
    BIAS: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """A program: ROWS tokens by COLUMNS outputs, which share the scales of the weight's blocks."""
    first = tl.program_id(1) * COLUMNS
    rows = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    columns = first + tl.arange(0, COLUMNS)
    steps = tl.arange(0, BLOCK)
    x_places = rows.to(tl.int64)[:, None] * inputs
    w_places = columns.to(tl.int64)[None, :] * inputs
    total = tl.zeros([ROWS, COLUMNS], tl.float32)
    for group in range(0, groups):
        at = group * BLOCK + steps
        there = at < inputs
        a = tl.load(x + x_places + at[None, :], mask=(rows < tokens)[:, None] & there[None, :], other=0.0)
        w = tl.load(weight + w_places + at[:, None], mask=(columns < outputs)[None, :] & there[:, None], other=0.0)
        a_scale = tl.load(x_scales + rows * groups + group, mask=rows < tokens, other=0.0)
        w_scale = tl.load(w_scales + first // BLOCK * groups + group)
        total += _product(a, w) * (a_scale * w_scale)[:, None]
    if BIAS:
        total += tl.load(bias + columns, mask=columns < outputs, other=0.0).to(tl.float32)[None, :]
    place = rows.to(tl.int64)[:, None] * outputs + columns[None, :]
    tl.store(out + place, total.to(out.dtype.element_ty), mask=(rows < tokens)[:, None] & (columns < outputs)[None, :])


def quantize(x: torch.Tensor, group: int | None = None) -> tuple[torch.Tensor, torch.Tensor]:
    """Quantise x so that the largest number of each group of a row becomes 448; by default a row is one group.

    Returns:
        float8_e4m3fn `[T, C]` and float32 scales `[T, ceil(C / group)]`.
    """
    tokens, width = x.shape
    group = group or width
    groups = -(-width // group)
    out = torch.empty(tokens, width, dtype=torch.float8_e4m3fn, device=x.device)
    scales = torch.empty(tokens, groups, dtype=torch.float32, device=x.device)
    padded = triton.next_power_of_2(group)
    launching.launch(
        _quantize_kernel,
        (tokens, groups),
        x, out, scales, x.stride(0), width, groups,
        GROUP=group, PADDED=padded, num_warps=max(1, min(16, padded // 512)), num_stages=1,
    )  # fmt: skip
    return out, scales


def block_linear(
    x: torch.Tensor, weight: torch.Tensor, scales: torch.Tensor, bias: torch.Tensor | None = None
) -> torch.Tensor:
    """x `[T, C]` -> `[T, N]` in its type; x is quantised by token and group of 128 columns.

    Args:
        x: `[T, C]`.
        weight: float8_e4m3fn `[N, C]`.
        scales: float32 `[ceil(N / 128), ceil(C / 128)]`.
        bias: `[N]`.
    """
    (tokens, inputs), outputs = x.shape, len(weight)
    small, x_scales = quantize(x, BLOCK)
    out = x.new_empty(tokens, outputs)
    rows, columns, stages = (16, 32, 4) if tokens <= 16 else (64, 128, 3)
    launching.launch(
        _block_linear_kernel,
        (-(-tokens // rows), -(-outputs // columns)),
        small, x_scales, weight, scales, out if bias is None else bias, out, tokens, outputs, inputs, scales.shape[1],
        BIAS=bias is not None, ROWS=rows, COLUMNS=columns, BLOCK=BLOCK, num_warps=4, num_stages=stages,
    )  # fmt: skip
    return out
