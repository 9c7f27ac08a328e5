"""The plain building blocks: linear maps, RMS norm, the gated MLP's activation."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch
import torch.nn.functional as F


@dataclass(slots=True)
class Linear:
    """y = x W^T + b. weight `[out, in]`, bias `[out]` or None; x `[T, in]`."""

    weight: torch.Tensor
    bias: torch.Tensor | None = None

    def __call__(self, x: torch.Tensor) -> torch.Tensor:
        return F.linear(x, self.weight, self.bias)

    def tensors(self) -> Iterator[torch.Tensor]:
        yield self.weight
        if self.bias is not None:
            yield self.bias


def rms_norm(x: torch.Tensor, weight: torch.Tensor, eps: float) -> torch.Tensor:
    """x `[T, C]`, weight `[C]`; the mean square is taken in float32 (Zhang and Sennrich, arXiv 1910.07467)."""
    wide = x.float()
    scaled = wide * torch.rsqrt(wide.pow(2).mean(-1, keepdim=True) + eps)
    return weight * scaled.to(x.dtype)


def silu_mul(gate_up: torch.Tensor) -> torch.Tensor:
    """silu(gate) * up from their concatenation `[T, 2 * I]`."""
    gate, up = gate_up.chunk(2, dim=-1)
    return F.silu(gate) * up
