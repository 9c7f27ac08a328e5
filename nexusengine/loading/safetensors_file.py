"""safetensors checkpoints: one file, or shards named by an index. Headers are checked before a tensor is touched;
torch is imported only when one is."""

from __future__ import annotations

import itertools
import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

from nexusengine.errors import ModelLoadError
from nexusengine.loading.config_json import read_json

if TYPE_CHECKING:
    import torch

    from nexusengine.loading.gguf_file import Q4Blocks

_MAX_HEADER_BYTES = 100_000_000
_BYTES = {
    "F64": 8, "F32": 4, "F16": 2, "BF16": 2, "I64": 8, "I32": 4, "I16": 2, "I8": 1, "U8": 1, "BOOL": 1,
    "F8_E4M3": 1, "F8_E5M2": 1,
}  # fmt: skip
_WEIGHT_TYPES = ("F64", "F32", "F16", "BF16")


def find_shards(folder: Path) -> tuple[Path, ...]:
    """The weight files of a checkpoint directory; empty if there are none. Raises ModelLoadError."""
    index = folder / "model.safetensors.index.json"
    single = folder / "model.safetensors"
    if not index.is_file():
        return (single,) if single.is_file() else tuple(sorted(folder.glob("*.safetensors")))
    weight_map = read_json(index).get("weight_map")
    if not isinstance(weight_map, dict) or not all(isinstance(v, str) for v in weight_map.values()):
        raise ModelLoadError(f"{index}: weight_map must map tensor names to file names")
    names = sorted(set(weight_map.values()))
    for name in names:
        if Path(name).name != name:
            raise ModelLoadError(f"{index}: {name!r} is not a file beside the index")
        if not (folder / name).is_file():
            raise ModelLoadError(f"{index} names {name}, which is not there")
    return tuple(folder / name for name in names)


def check_header(path: Path) -> dict[str, dict[str, Any]]:
    """The header's tensors, after checking it against the file's size. Raises ModelLoadError naming file and tensor."""

    def fail(what: str) -> ModelLoadError:
        return ModelLoadError(f"{path} is not a usable safetensors file: {what}")

    try:
        size = path.stat().st_size
        with path.open("rb") as file:
            length = int.from_bytes(file.read(8), "little")
            if size < 8 or length > min(size - 8, _MAX_HEADER_BYTES):
                raise fail(f"it says its header has {length} bytes, the file has {size}")
            header = json.loads(file.read(length))
    except OSError as error:
        raise ModelLoadError(f"cannot read {path}: {error.strerror}") from None
    except ValueError as error:
        raise fail(f"its header is not JSON: {error}") from None
    if not isinstance(header, dict):
        raise fail("its header is not a JSON object")
    header.pop("__metadata__", None)
    spans = []
    for name, entry in header.items():
        try:
            begin, end = entry["data_offsets"]
            elements = 1
            for dimension in entry["shape"]:
                if not isinstance(dimension, int) or dimension < 0:
                    raise TypeError
                elements *= dimension
            expected = elements * _BYTES[entry["dtype"]]
            sound = 0 <= begin <= end <= size - 8 - length and end - begin == expected
        except (TypeError, ValueError, KeyError):
            raise fail(f"the entry of tensor {name} is malformed: {str(entry)[:200]}") from None
        if not sound:
            raise fail(f"tensor {name} at bytes {begin} to {end} does not fit its shape or the file of {size} bytes")
        spans.append((begin, end, name))
    spans.sort()
    for (_, end, name), (begin, _, other) in itertools.pairwise(spans):
        if begin != end:
            raise fail(f"tensors {name} and {other} {'overlap' if begin < end else 'have a gap between them'}")
    begin, end = (spans[0][0], spans[-1][1]) if spans else (0, 0)
    if begin != 0 or end != size - 8 - length:
        raise fail(f"its tensors lie at bytes {begin} to {end} of {size - 8 - length} bytes of data")
    return header


class SafetensorsSource:
    """Tensors of one or more checked files, memory-mapped."""

    def __init__(self, paths: tuple[Path, ...]) -> None:
        self._file_of: dict[str, Path] = {}
        self._shapes: dict[str, tuple[int, ...]] = {}
        for path in paths:
            for name, entry in check_header(path).items():
                if name in self._file_of:
                    raise ModelLoadError(f"tensor {name} is in both {self._file_of[name]} and {path}")
                if entry["dtype"] not in _WEIGHT_TYPES:
                    raise ModelLoadError(
                        f"{path}: tensor {name} has type {entry['dtype']}; supported: {', '.join(_WEIGHT_TYPES)}"
                    )
                self._file_of[name] = path
                self._shapes[name] = tuple(entry["shape"])
        self._open: dict[Path, Any] = {}

    def names(self) -> frozenset[str]:
        return frozenset(self._shapes)

    def shape(self, name: str) -> tuple[int, ...]:
        return self._shapes[name]

    def get(self, name: str, dtype: torch.dtype) -> torch.Tensor:
        """A contiguous tensor of its own on the CPU."""
        from safetensors import SafetensorError, safe_open

        path = self._file_of[name]
        try:
            if path not in self._open:
                self._open[path] = safe_open(path, framework="pt")
            tensor: torch.Tensor = self._open[path].get_tensor(name)
        except (SafetensorError, OSError) as error:
            raise ModelLoadError(f"{path} is not a usable safetensors file: tensor {name}: {error}") from None
        return tensor.to(dtype).contiguous()

    def blocks(self, name: str) -> Q4Blocks | None:
        """None: no type of these files is made of 4-bit blocks."""
        return None

    def close(self) -> None:
        """Unmaps the files."""
        self._open.clear()
