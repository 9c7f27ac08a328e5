"""One way to read weights, whatever the file format. Names are Hugging Face's."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Protocol

import torch

from nexusengine.errors import ModelLoadError
from nexusengine.loading.gguf_file import GGUFFile, Q4Blocks
from nexusengine.loading.resolve import ModelFiles
from nexusengine.loading.safetensors_file import SafetensorsSource


class WeightSource(Protocol):
    """Tensors by name. `get` returns a contiguous CPU tensor that the caller owns; KeyError for an unknown name."""

    def names(self) -> frozenset[str]: ...

    def shape(self, name: str) -> tuple[int, ...]: ...

    def get(self, name: str, dtype: torch.dtype) -> torch.Tensor: ...

    def blocks(self, name: str) -> Q4Blocks | None:
        """A matrix in the 4-bit blocks it is stored in; None if it is stored otherwise."""
        ...


class GGUFSource:
    """Tensors of a GGUF file, dequantised one at a time."""

    def __init__(self, file: GGUFFile) -> None:
        self._file = file

    def names(self) -> frozenset[str]:
        return frozenset(self._file.tensors) - {"rope_freqs.weight"}

    def shape(self, name: str) -> tuple[int, ...]:
        return self._file.tensors[name].shape

    def get(self, name: str, dtype: torch.dtype) -> torch.Tensor:
        return torch.from_numpy(self._file.array(name)).to(dtype).contiguous()

    def blocks(self, name: str) -> Q4Blocks | None:
        return self._file.blocks(name)


@contextmanager
def open_weights(files: ModelFiles) -> Iterator[WeightSource]:
    """Raises ModelLoadError naming file and tensor when something is damaged."""
    if files.kind == "gguf":
        yield GGUFSource(GGUFFile(files.path))
    elif files.kind == "safetensors":
        source = SafetensorsSource(files.weights)
        try:
            yield source
        finally:
            source.close()
    else:
        raise ModelLoadError(f"{files.path} holds no weights (*.safetensors)")
