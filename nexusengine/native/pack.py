"""Weights in the layouts of src/weights.h: panels of 16 outputs, computed side by side."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
import torch
import torch.nn.functional as F

from nexusengine.loading.gguf_file import Q4Blocks
from nexusengine.native import structs

PANEL = 16


@dataclass(frozen=True, slots=True)
class PackedWeight:
    """A weight in the form that a kernel reads.

    Attributes:
        n: outputs.
        k: inputs.
        kind: of structs.
        scale: by kind, else None; so are minimum and bias.
    """

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


def pack_int8(weight: torch.Tensor, bias: torch.Tensor | None, gated: bool) -> PackedWeight:
    """float32 weight `[n, k]` rounded to 8 bits, one scale a row: largest / 127."""
    n, k = weight.shape
    scale = weight.abs().amax(dim=1) / 127
    q = torch.where(scale[:, None] > 0, weight / scale[:, None], 0.0).round().to(torch.int8)
    data = _groups(panels(F.pad(q, (0, -k % 4)), gated))
    scales = panels(scale, gated).flatten().contiguous()
    return PackedWeight(n, k, structs.INT8, data, scales, bias=bias, int8_activations=True)


def pack_q4(blocks: Q4Blocks, bias: torch.Tensor | None, gated: bool) -> PackedWeight:
    """4-bit blocks, kept as they are."""
    n, k = blocks.q.shape
    groups = _groups(panels(torch.from_numpy(blocks.q), gated))  # [P, k / 4, 16, 4]
    data = groups[:, 0::2] | groups[:, 1::2] << 4
    scale, minimum = (
        panels(torch.from_numpy(t.view(np.int16)), gated).transpose(1, 2).contiguous()
        for t in (blocks.scale, blocks.minimum)
    )
    return PackedWeight(n, k, structs.Q4, data.contiguous(), scale, minimum, bias, int8_activations=True)


def q4_blocks(weight: torch.Tensor) -> Q4Blocks:
    """float32 weight `[n, k]`, k a multiple of 32, rounded to 4 bits between least and largest number of each block."""
    n, k = weight.shape
    cut = weight.reshape(n, k // 32, 32)
    minimum = cut.amin(dim=2).half()
    scale = ((cut.amax(dim=2) - minimum.float()) / 15).half()
    q = torch.where(scale[..., None] > 0, (cut - minimum.float()[..., None]) / scale.float()[..., None], 0.0)
    numbers = q.round().clamp(0, 15).to(torch.uint8).reshape(n, k)
    return Q4Blocks(numbers.numpy(), scale.numpy(), minimum.numpy())


def _groups(rows: torch.Tensor) -> torch.Tensor:
    """`[P, 16, k]` -> `[P, k / 4, 16, 4]`."""
    count, _, k = rows.shape
    return rows.reshape(count, PANEL, k // 4, 4).transpose(1, 2).contiguous()
