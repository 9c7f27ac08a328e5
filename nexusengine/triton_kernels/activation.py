"""The gated MLP's activation."""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from nexusengine.triton_kernels import launch as launching

_COLUMNS = 1024


@triton.jit
def _silu_mul_kernel(gate_up, out, in_stride, out_stride, width, COLUMNS: tl.constexpr):
    """A program: COLUMNS of one row. silu is rounded to its type before it is multiplied, as layers.basic does."""
    row = tl.program_id(0).to(tl.int64)
    columns = tl.program_id(1) * COLUMNS + tl.arange(0, COLUMNS)
    within = columns < width
    gate = tl.load(gate_up + row * in_stride + columns, mask=within, other=0.0).to(tl.float32)
    up = tl.load(gate_up + row * in_stride + width + columns, mask=within, other=0.0).to(tl.float32)
    silu = (gate / (1.0 + tl.exp(-gate))).to(out.dtype.element_ty).to(tl.float32)
    tl.store(out + row * out_stride + columns, (silu * up).to(out.dtype.element_ty), mask=within)


def silu_mul(gate_up: torch.Tensor) -> torch.Tensor:
    """silu(gate) * up from their concatenation `[T, 2 * I]`."""
    rows, width = len(gate_up), gate_up.shape[1] // 2
    out = gate_up.new_empty(rows, width)
    launching.launch(
        _silu_mul_kernel,
        (rows, -(-width // _COLUMNS)),
        gate_up, out, gate_up.stride(0), out.stride(0), width, COLUMNS=_COLUMNS, num_warps=4, num_stages=1,
    )  # fmt: skip
    return out
