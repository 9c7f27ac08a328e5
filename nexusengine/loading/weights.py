"""One way to read weights, whatever the file format. Names are Hugging Face's."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, Protocol

import torch

from nexusengine.errors import ModelLoadError
from nexusengine.loading.fp8 import Fp8Source
from nexusengine.loading.gguf_file import GGUFFile, Q4Blocks
from nexusengine.loading.packed import PackedSource
from nexusengine.loading.resolve import ModelFiles
from nexusengine.loading.safetensors_file import SafetensorsSource

_TYPES = {"fp8": ("F8_E4M3",), "awq": ("I32",), "gptq": ("I32",)}
"""Of tensors in a checkpoint beside plain floats, by how it stores its weights."""


class Stored(Protocol):
    """A matrix `[out, in]` in the form it is stored in, where that is not plain numbers."""

    @staticmethod
    def join(parts: Any) -> Any:
        """Several of one form, one below the other; None if that cannot be said in this form."""
        ...

    def to(self, device: torch.device) -> Stored: ...

    def scaled(self, factor: float) -> Stored:
        """All numbers times `factor`."""
        ...


class WeightSource(Protocol):
    """Tensors by name.

    `get` returns a contiguous CPU tensor, to be copied if it is to outlive the source; KeyError for an unknown name.
    """

    def names(self) -> frozenset[str]: ...

    def shape(self, name: str) -> tuple[int, ...]: ...

    def get(self, name: str, dtype: torch.dtype) -> torch.Tensor: ...

    def stored(self, name: str) -> Stored | None:
        """A matrix in the form it is stored in; None if that is plain numbers."""
        ...

    def phase(self) -> str:
        """A phrase for what is being done; with several files, which one."""
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

    def stored(self, name: str) -> Q4Blocks | None:
        return self._file.blocks(name)

    def phase(self) -> str:
        return "loading weights"


@contextmanager
def open_weights(files: ModelFiles) -> Iterator[WeightSource]:
    """Open a model's weights for the length of the block.

    Raises:
        ModelLoadError: something is damaged; names file and tensor.
    """
    if files.kind == "gguf":
        yield GGUFSource(GGUFFile(files.path))
    elif files.kind == "safetensors":
        stored = files.config.stored
        source = SafetensorsSource(files.weights, _TYPES[stored.method] if stored else ())
        try:
            if stored is None:
                yield source
            else:
                yield Fp8Source(source, stored) if stored.method == "fp8" else PackedSource(source, stored)
        finally:
            source.close()
    else:
        raise ModelLoadError(f"{files.path} holds no weights (*.safetensors)")
