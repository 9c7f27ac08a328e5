"""Weights stored as 8-bit floats with scales beside them, as published FP8 checkpoints have them.

A map's weight `X.weight` is float8_e4m3fn `[out, in]`; its scale, by which it is multiplied, is `X.weight_scale` or
`X.weight_scale_inv` (which is no inverse, whatever its name): one number, one for each output, or one for each block.
Scales of activations (`X.input_scale`) are not used: activations are quantised by what they are.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

from nexusengine.errors import ModelLoadError
from nexusengine.loading.safetensors_file import SafetensorsSource
from nexusengine.model_config import StoredWeights

_SCALES = ("_scale", "_scale_inv")
_UNUSED = (".input_scale", ".activation_scale", ".weight_scale", ".weight_scale_inv")


@dataclass(frozen=True, slots=True)
class Fp8Weight:
    """A matrix `[n, k]` of 8-bit floats with scales.

    Attributes:
        data: float8_e4m3fn `[n, k]`.
        scale: float32 `[n, 1]`, or `[ceil(n / rows), ceil(k / columns)]`.
        block: (rows, columns) that share a scale; None: one scale a row.
    """

    data: torch.Tensor
    scale: torch.Tensor
    block: tuple[int, int] | None = None

    @staticmethod
    def join(parts: list[Fp8Weight]) -> Fp8Weight | None:
        """Matrices of the same width and kind, one below the other; None where one ends within a block."""
        blocks = {part.block for part in parts}
        block = parts[0].block
        if len(blocks) > 1 or (block and any(len(part.data) % block[0] for part in parts[:-1])):
            return None
        data = torch.cat([part.data.view(torch.uint8) for part in parts]).view(torch.float8_e4m3fn)
        return Fp8Weight(data, torch.cat([part.scale for part in parts]), block)

    def to(self, device: torch.device) -> Fp8Weight:
        return Fp8Weight(self.data.to(device), self.scale.to(device), self.block)

    def scaled(self, factor: float) -> Fp8Weight:
        """All numbers times `factor`."""
        return Fp8Weight(self.data, self.scale * factor, self.block)

    def numbers(self, dtype: torch.dtype) -> torch.Tensor:
        """`[n, k]`, multiplied in float32."""
        scale, (n, k) = self.scale, self.data.shape
        if self.block:
            rows, columns = self.block
            scale = scale.repeat_interleave(rows, 0)[:n].repeat_interleave(columns, 1)[:, :k]
        return (self.data.float() * scale).to(dtype)


class Fp8Source:
    """A WeightSource over the files of such a checkpoint. Maps that are stored as plain numbers stay what they are."""

    def __init__(self, files: SafetensorsSource, stored: StoredWeights) -> None:
        self._files, self._block = files, stored.block
        self._names = frozenset(n for n in files.names() if not n.endswith(_UNUSED))

    def names(self) -> frozenset[str]:
        return self._names

    def shape(self, name: str) -> tuple[int, ...]:
        return self._files.shape(name)

    def phase(self) -> str:
        return self._files.phase()

    def get(self, name: str, dtype: torch.dtype) -> torch.Tensor:
        stored = self.stored(name)
        return self._files.get(name, dtype) if stored is None else stored.numbers(dtype)

    def stored(self, name: str) -> Fp8Weight | None:
        """The weight as it is stored, with its scale.

        Raises:
            ModelLoadError: it has no scale, or one of a shape that says nothing.
        """
        if self._files.kind(name) != "F8_E4M3":
            return None
        scale_name = next((name + end for end in _SCALES if name + end in self._files.names()), None)
        if scale_name is None:
            raise ModelLoadError(f"tensor {name} is stored as 8-bit floats, but {name}_scale is missing")
        n, k = self._files.shape(name)
        scale = self._files.get(scale_name, torch.float32)
        block = None
        if scale.numel() == 1:
            scale = scale.reshape(1, 1).expand(n, 1).contiguous()
        elif scale.shape in ((n,), (n, 1)):
            scale = scale.reshape(n, 1)
        elif self._block and scale.shape == (-(-n // self._block[0]), -(-k // self._block[1])):
            block = self._block
        else:
            raise ModelLoadError(
                f"tensor {scale_name} has the shape {list(scale.shape)}, which does not fit {name} {[n, k]}"
                + (f" in blocks of {list(self._block)}" if self._block else "")
            )
        return Fp8Weight(self._files.raw(name), scale, block)
