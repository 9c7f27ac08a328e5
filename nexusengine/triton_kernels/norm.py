"""RMS norm."""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from nexusengine.triton_kernels import launch as launching


@triton.jit
def _rms_norm_kernel(x, weight, out, x_stride, out_stride, eps, WIDTH: tl.constexpr, WIDTH_PADDED: tl.constexpr):
    """A program: one row. Rounded to x's type before the weight is applied, as layers.basic.rms_norm does."""
    row = tl.program_id(0).to(tl.int64)
    columns = tl.arange(0, WIDTH_PADDED)
    within = columns < WIDTH
    wide = tl.load(x + row * x_stride + columns, mask=within, other=0.0).to(tl.float32)
    factor = 1.0 / tl.sqrt(tl.sum(wide * wide, 0) / WIDTH + eps)
    scaled = (wide * factor).to(x.dtype.element_ty).to(tl.float32)
    w = tl.load(weight + columns, mask=within, other=0.0).to(tl.float32)
    tl.store(out + row * out_stride + columns, (scaled * w).to(out.dtype.element_ty), mask=within)


def rms_norm(x: torch.Tensor, weight: torch.Tensor, eps: float) -> torch.Tensor:
    """x `[T, C]`, weight `[C]` of the same type; the mean square is taken in float32."""
    out = torch.empty_like(x, memory_format=torch.contiguous_format)
    width = x.shape[1]
    padded = triton.next_power_of_2(width)
    launching.launch(
        _rms_norm_kernel,
        (len(x),),
        x, weight, out, x.stride(0), out.stride(0), eps,
        WIDTH=width, WIDTH_PADDED=padded, num_warps=max(1, min(16, padded // 512)), num_stages=1,
    )  # fmt: skip
    return out
