"""The header of a GGUF file: metadata and where each tensor lies. No torch.

Every count, length and offset is checked against the file's size before it is believed. A vocabulary of 50,000 strings
is read in 0.1 s.
"""

from __future__ import annotations

import math
import mmap
import struct
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from nexusengine.errors import ModelLoadError
from nexusengine.loading.shown import one_line, short

_SCALARS = {0: "<B", 1: "<b", 2: "<H", 3: "<h", 4: "<I", 5: "<i", 6: "<f", 7: "<?", 10: "<Q", 11: "<q", 12: "<d"}
_STRING, _ARRAY = 8, 9
_MAX_ENTRIES, _MAX_DIMENSIONS = 1 << 20, 4
_VERSIONS = (2, 3)
_OLD_FORMATS = (b"lmgg", b"tjgg", b"fmgg", b"algg", b"ggml", b"ggjt", b"ggmf", b"ggla")
"""How files of llama.cpp's formats before GGUF begin, as they are stored and as they are called."""


@dataclass(frozen=True, slots=True)
class GGUFTensor:
    """A tensor of a GGUF file: what it is and where it lies.

    Attributes:
        shape: as in torch (rows first).
        kind: the name of its GGML type.
        offset: in bytes, in file `part`.
        nbytes: how many bytes it takes.
    """

    shape: tuple[int, ...]
    kind: str
    offset: int
    nbytes: int
    part: int = 0


class Cursor:
    """Reads little-endian values one after the other, never past the end.

    In every method, `what` is the name of the value in errors. All raise ModelLoadError.
    """

    def __init__(self, data: mmap.mmap, path: Path) -> None:
        self.data, self.path, self.at = data, path, 0

    def fail(self, what: str) -> ModelLoadError:
        return ModelLoadError(f"{self.path} is not a usable GGUF file: {one_line(what)}")

    def take(self, size: int, what: str) -> bytes:
        if size < 0 or self.at + size > len(self.data):
            raise self.fail(f"the file ends inside {what} (byte {self.at}, {size} wanted, {len(self.data)} in all)")
        self.at += size
        return self.data[self.at - size : self.at]

    def scalar(self, code: str, what: str) -> Any:
        return struct.unpack(code, self.take(struct.calcsize(code), what))[0]

    def count(self, what: str, limit: int = _MAX_ENTRIES) -> int:
        value: int = self.scalar("<Q", what)
        if value > limit:
            raise self.fail(f"{what} is {value}, more than {limit}")
        return value

    def string(self, what: str) -> str:
        return self.take(self.count(f"the length of {what}", len(self.data)), what).decode("utf-8", "replace")

    def value(self, kind: int, what: str) -> Any:
        if kind in _SCALARS:
            return self.scalar(_SCALARS[kind], what)
        if kind == _STRING:
            return self.string(what)
        if kind != _ARRAY:
            raise self.fail(f"{what} has the unknown type {kind}")
        item_kind, length = self.scalar("<I", what), self.count(f"the length of {what}", len(self.data))
        if item_kind in _SCALARS:
            code = _SCALARS[item_kind]
            raw = self.take(length * struct.calcsize(code), what)
            return np.frombuffer(raw, np.dtype(code.replace("?", "b1"))).tolist()
        if item_kind != _STRING:
            raise self.fail(f"{what} is an array of type {item_kind}, which is not supported")
        return [self.string(what) for _ in range(length)]


def read_header(data: mmap.mmap, path: Path) -> tuple[dict[str, Any], dict[str, GGUFTensor]]:
    """(metadata, tensors by the names in the file).

    Raises:
        ModelLoadError: the header is damaged.
    """
    cursor = Cursor(data, path)
    _check_kind(cursor)
    tensor_count, pair_count = cursor.count("the tensor count"), cursor.count("the metadata count")
    metadata: dict[str, Any] = {}
    for _ in range(pair_count):
        key = cursor.string("a metadata key")
        metadata[key] = cursor.value(cursor.scalar("<I", f"the type of {key}"), key)
    infos = [_tensor_info(cursor) for _ in range(tensor_count)]
    alignment = metadata.get("general.alignment", 32)
    if not isinstance(alignment, int) or not 0 < alignment <= 1 << 16 or alignment & (alignment - 1):
        raise cursor.fail(f"general.alignment is {short(alignment)}, which is no power of two up to 65536")
    start = -(-cursor.at // alignment) * alignment
    tensors: dict[str, GGUFTensor] = {}
    for name, shape, kind, at, nbytes in infos:
        offset = start + at
        if at % alignment or offset + nbytes > len(data):
            raise cursor.fail(
                f"tensor {name} should lie at bytes {offset} to {offset + nbytes}, but the file has {len(data)} bytes"
            )
        if name in tensors:
            raise cursor.fail(f"tensor {name} is there twice")
        tensors[name] = GGUFTensor(shape, kind, offset, nbytes)
    return metadata, tensors


def _check_kind(cursor: Cursor) -> None:
    magic = cursor.take(4, "the magic number")
    if magic in _OLD_FORMATS:
        raise cursor.fail(
            f"it is of a format before GGUF ({magic!r}), which llama.cpp gave up in 2023; convert it anew"
        )
    if magic == b"FUGG":
        raise cursor.fail("it is big-endian; take one that was written for little-endian machines")
    if magic != b"GGUF":
        raise cursor.fail(f"it begins with {magic!r} instead of b'GGUF'")
    version = cursor.scalar("<I", "the version")
    swapped = int.from_bytes(version.to_bytes(4, "little"), "big")
    if version not in _VERSIONS and 1 <= swapped <= max(_VERSIONS):
        raise cursor.fail(f"it is big-endian (version {swapped}); take one that was written for little-endian machines")
    if version == 1:
        raise cursor.fail("it is of the old version 1, of August 2023; convert it anew, or take a newer file")
    if version not in _VERSIONS:
        raise cursor.fail(f"version {version} is not supported; known: 2, 3")


def _tensor_info(cursor: Cursor) -> tuple[str, tuple[int, ...], str, int, int]:
    """(name, shape, type, offset in the data, bytes); of a type that the gguf package does not know, no bytes."""
    from gguf.constants import GGML_QUANT_SIZES, GGMLQuantizationType

    name = cursor.string("a tensor's name")
    dimensions = cursor.scalar("<I", f"the dimensions of {name}")
    if not 1 <= dimensions <= _MAX_DIMENSIONS:
        raise cursor.fail(f"tensor {name} has {dimensions} dimensions")
    shape = tuple(cursor.scalar("<Q", f"the shape of {name}") for _ in range(dimensions))[::-1]
    number, offset = cursor.scalar("<I", f"the type of {name}"), cursor.scalar("<Q", f"the offset of {name}")
    elements = math.prod(shape)
    if not 0 < elements < 1 << 48:
        raise cursor.fail(f"tensor {name} cannot have the shape {shape}")
    try:
        kind = GGMLQuantizationType(number)
        per_block, block_bytes = GGML_QUANT_SIZES[kind]
    except (ValueError, KeyError):
        return name, shape, f"number {number}", offset, 0
    if shape[-1] % per_block:
        raise cursor.fail(f"tensor {name} of type {kind.name} cannot have the shape {shape}")
    return name, shape, kind.name, offset, elements // per_block * block_bytes
