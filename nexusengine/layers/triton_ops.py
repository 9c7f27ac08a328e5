"""The table of operations on CUDA: Triton kernels for what only moves memory, torch (cuBLAS) for the linear maps.

The residual addition is part of the linear map before it (beta = 1 in the product), so that it costs one more read and
no kernel of its own.
"""

from __future__ import annotations

import torch

from nexusengine.attention.base import AttentionBackend, AttentionMeta
from nexusengine.layers.basic import Linear
from nexusengine.layers.fp8 import Fp8Linear, suits
from nexusengine.layers.ops import TorchOps
from nexusengine.layers.packed import PackedMaps
from nexusengine.layers.rotary import RotaryEmbedding
from nexusengine.loading.fp8 import Fp8Weight
from nexusengine.loading.weights import Stored
from nexusengine.triton_kernels.activation import silu_mul
from nexusengine.triton_kernels.norm import rms_norm
from nexusengine.triton_kernels.rope import rotate_and_store


class TritonOps(TorchOps):
    """fp8: the device multiplies 8-bit floats (compute capability 8.9), so that weights stored as such stay so."""

    name = "triton"

    def __init__(self, eps: float, fp8: bool = False, packed: PackedMaps | None = None) -> None:
        super().__init__(eps, packed)
        self._fp8 = fp8
        self.keeps_stored = fp8 or packed is not None

    def takes(self, weight: Stored, *, head: bool = False) -> bool:
        if isinstance(weight, Fp8Weight):
            return self._fp8 and not head and suits(weight)
        return super().takes(weight, head=head)

    def pack(
        self,
        weight: torch.Tensor | Stored,
        bias: torch.Tensor | None = None,
        *,
        gated: bool = False,
        head: bool = False,
    ) -> Linear:
        if isinstance(weight, Fp8Weight):
            return Fp8Linear(weight.data, bias, weight.scale, weight.block is not None)
        return super().pack(weight, bias, gated=gated, head=head)

    def norm(self, x: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
        return rms_norm(x, weight, self._eps)

    def add_linear(self, to: Linear, x: torch.Tensor, into: torch.Tensor) -> torch.Tensor:
        if type(to) is not Linear:
            return into.add_(to(x))
        into = into.addmm_(x, to.weight.t())
        return into if to.bias is None else into.add_(to.bias)

    def gated(self, to: Linear, x: torch.Tensor, norm: torch.Tensor | None = None) -> torch.Tensor:
        return silu_mul(self.linear(to, x, norm))

    def rope_table(  # type: ignore[override]
        self, rotary: RotaryEmbedding, positions: torch.Tensor
    ) -> tuple[RotaryEmbedding, torch.Tensor]:
        return rotary, positions

    def rotate_and_store(  # type: ignore[override]
        self,
        qkv: torch.Tensor,
        rope_table: tuple[RotaryEmbedding, torch.Tensor],
        attention: AttentionBackend,
        k_cache: torch.Tensor,
        v_cache: torch.Tensor,
        meta: AttentionMeta,
        heads: tuple[int, int, int],
    ) -> torch.Tensor:
        """q is rotated in qkv itself and returned as a view of it: tokens lie apart."""
        rotary, positions = rope_table
        if not attention.caps().plain_cache:
            return super().rotate_and_store(qkv, rotary.at(positions), attention, k_cache, v_cache, meta, heads)
        rotate_and_store(qkv, rotary.cos, rotary.sin, positions, meta.slot_mapping, k_cache, v_cache, heads)
        count, _, dim = heads
        return qkv[:, : count * dim].view(-1, count, dim)
