"""Weights of few bits packed into 32-bit integers, as AWQ and GPTQ checkpoints have them.

They are not unpacked here: what computes with them (layers.packed) takes them as they are. A map `X` has `X.qweight`,
`X.qzeros`, `X.scales` and, of GPTQ, `X.g_idx`; here it is `X.weight`, as everywhere.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass

import torch

from nexusengine.errors import ModelLoadError
from nexusengine.loading.safetensors_file import SafetensorsSource
from nexusengine.model_config import StoredWeights

_PARTS = ("qweight", "qzeros", "scales", "g_idx")


@dataclass(frozen=True, slots=True)
class PackedPart:
    """One map of the checkpoint.

    Attributes:
        inputs: columns of the weight.
        outputs: rows of the weight.
        tensors: by their names in it (`qweight`, ...).
    """

    inputs: int
    outputs: int
    tensors: Mapping[str, torch.Tensor]


@dataclass(frozen=True, slots=True)
class PackedWeight:
    """Maps of the same inputs, one below the other. They stay apart: each may have an order of inputs of its own."""

    stored: StoredWeights
    parts: tuple[PackedPart, ...]

    @staticmethod
    def join(weights: list[PackedWeight]) -> PackedWeight:
        return PackedWeight(weights[0].stored, tuple(part for weight in weights for part in weight.parts))

    def to(self, device: torch.device) -> PackedWeight:
        return self._each(lambda name, tensor: tensor.to(device))

    def scaled(self, factor: float) -> PackedWeight:
        return self._each(lambda name, tensor: tensor * factor if name == "scales" else tensor)

    def _each(self, change: Callable[[str, torch.Tensor], torch.Tensor]) -> PackedWeight:
        return PackedWeight(
            self.stored,
            tuple(
                PackedPart(part.inputs, part.outputs, {name: change(name, t) for name, t in part.tensors.items()})
                for part in self.parts
            ),
        )


class PackedSource:
    """A WeightSource over the files of such a checkpoint. Maps that are not packed stay what they are."""

    def __init__(self, files: SafetensorsSource, stored: StoredWeights) -> None:
        self._files, self._stored = files, stored
        self._maps = {n.removesuffix(".qweight") for n in files.names() if n.endswith(".qweight")}
        parts = {f"{name}.{part}" for name in self._maps for part in _PARTS}
        self._names = frozenset(files.names() - parts | {f"{name}.weight" for name in self._maps})

    def names(self) -> frozenset[str]:
        return self._names

    def shape(self, name: str) -> tuple[int, ...]:
        """The shape of a tensor; of a packed map, what its packed tensor comes to: GPTQ packs inputs, AWQ outputs."""
        if (stem := name.removesuffix(".weight")) not in self._maps:
            return self._files.shape(name)
        rows, columns = self._files.shape(f"{stem}.qweight")
        each = 32 // self._stored.bits
        return (columns, rows * each) if self._stored.method == "gptq" else (columns * each, rows)

    def get(self, name: str, dtype: torch.dtype) -> torch.Tensor:
        if name.removesuffix(".weight") in self._maps:
            raise ModelLoadError(f"tensor {name} is packed by {self._stored.method}, and here it is needed unpacked")
        return self._files.get(name, dtype)

    def stored(self, name: str) -> PackedWeight | None:
        stem = name.removesuffix(".weight")
        if stem not in self._maps:
            return None
        there = self._files.names()
        for part in ("qzeros", "scales"):
            if f"{stem}.{part}" not in there:
                raise ModelLoadError(f"tensor {stem}.qweight is there, but {stem}.{part} is missing")
        tensors = {part: self._files.raw(f"{stem}.{part}") for part in _PARTS if f"{stem}.{part}" in there}
        outputs, inputs = self.shape(name)
        return PackedWeight(self._stored, (PackedPart(inputs, outputs, tensors),))

    def phase(self) -> str:
        return self._files.phase()
