"""Weights in the layouts of src/weights.h: panels of 16 outputs, computed side by side."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch
import torch.nn.functional as F

from nexusengine.native import structs

PANEL = 16


@dataclass(frozen=True, slots=True)
class PackedWeight:
    """n outputs, k inputs; kind: of structs. scale, minimum, bias: by kind, else None."""

    n: int
    k: int
    kind: int
    data: torch.Tensor
    scale: torch.Tensor | None = None
    minimum: torch.Tensor | None = None
    bias: torch.Tensor | None = None
    int8_activations: bool = False

    def tensors(self) -> Iterator[torch.Tensor]:
        yield from (t for t in (self.data, self.scale, self.minimum, self.bias) if t is not None)

    def struct(self) -> structs.Weight:
        """For the kernels; valid while this object lives."""
        pointers = [None if t is None else t.data_ptr() for t in (self.data, self.scale, self.minimum, self.bias)]
        return structs.Weight(*pointers, self.n, self.k, self.kind, int(self.int8_activations))


def panels(rows: torch.Tensor, gated: bool) -> torch.Tensor:
    """`[n, ...]` -> `[P, 16, ...]`, filled up with zeros; gated: each half in panels of its own."""
    if gated:
        gate, up = rows.chunk(2)
        return torch.cat([panels(gate, False), panels(up, False)])
    missing = -len(rows) % PANEL
    if missing:
        rows = F.pad(rows, [0, 0] * (rows.dim() - 1) + [0, missing])
    return rows.reshape(-1, PANEL, *rows.shape[1:])


def pack_float(weight: torch.Tensor, bias: torch.Tensor | None, gated: bool) -> PackedWeight:
    """float32 or bfloat16 weight `[n, k]`, kept in its type; bias float32 `[n]`."""
    kind = {torch.float32: structs.F32, torch.bfloat16: structs.BF16}[weight.dtype]
    data = panels(weight, gated).transpose(1, 2).contiguous()
    return PackedWeight(weight.shape[0], weight.shape[1], kind, data, bias=bias)
