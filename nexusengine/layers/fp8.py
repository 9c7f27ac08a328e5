"""Linear maps whose weights stay 8-bit floats on the device.

Activations are quantised on the way in: by token, or by token and group of 128.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field

import torch

from nexusengine.layers.basic import Linear
from nexusengine.loading.fp8 import Fp8Weight
from nexusengine.triton_kernels import fp8

_ALIGNED = 16
"""Rows and columns of a weight must be multiples of it for torch._scaled_mm."""


def suits(weight: Fp8Weight) -> bool:
    """True if there is a product for a weight of this shape and with scales of this kind."""
    if weight.block:
        return weight.block == (fp8.BLOCK, fp8.BLOCK)
    return not any(size % _ALIGNED for size in weight.data.shape)


@dataclass(slots=True)
class Fp8Linear(Linear):
    """weight float8_e4m3fn `[out, in]`; scale float32 `[out, 1]`, or by blocks of 128 x 128 with `blocks`."""

    scale: torch.Tensor = field(default_factory=lambda: torch.ones(1, 1))
    blocks: bool = False

    def __call__(self, x: torch.Tensor) -> torch.Tensor:
        """The product by outputs comes in bfloat16, which is the one type that torch has for it."""
        if self.blocks:
            return fp8.block_linear(x, self.weight, self.scale, self.bias)
        small, scales = fp8.quantize(x)
        out = torch._scaled_mm(
            small, self.weight.t(), scale_a=scales, scale_b=self.scale.view(1, -1), out_dtype=torch.bfloat16
        ).to(x.dtype)
        return out if self.bias is None else out.add_(self.bias)

    def tensors(self) -> Iterator[torch.Tensor]:
        yield from Linear.tensors(self)
        yield self.scale
