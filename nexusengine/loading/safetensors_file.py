"""safetensors checkpoints: one file, or shards named by an index.

Headers are checked before a tensor is touched; torch is imported only when one is.
"""

from __future__ import annotations

import itertools
import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

from nexusengine.errors import ModelLoadError
from nexusengine.loading.files import read_json, refuse_pointer, unreadable
from nexusengine.loading.shown import one_line, short

if TYPE_CHECKING:
    import torch

SINGLE, INDEX = "model.safetensors", "model.safetensors.index.json"
_OTHERS = ("consolidated", "adapter_model")
"""How files begin whose tensors have other names than ours: Mistral's own format, and LoRA adapters."""
_MAX_HEADER_BYTES = 100_000_000
_BYTES = {
    "F64": 8, "F32": 4, "F16": 2, "BF16": 2, "I64": 8, "I32": 4, "I16": 2, "I8": 1, "U8": 1, "BOOL": 1,
    "F8_E4M3": 1, "F8_E5M2": 1,
}  # fmt: skip
_WEIGHT_TYPES = ("F64", "F32", "F16", "BF16")
_MOST_OPEN = 2
"""Files mapped at a time. Checkpoints are written in the order of the layers, so that a layer lies in two at most."""


def find_shards(folder: Path) -> tuple[Path, ...]:
    """The weight files of a checkpoint directory, as transformers chooses; empty if there are none.

    model.safetensors, else what the index names; without either, all there are.

    Raises:
        ModelLoadError: the index cannot be read, or a file that it names is missing.
    """
    if (folder / SINGLE).is_file():
        return (folder / SINGLE,)
    if not (folder / INDEX).is_file():
        names = sorted(path.name for path in folder.glob("*.safetensors"))
        return tuple(folder / name for name in names if not name.startswith(_OTHERS))
    names = indexed_files(folder / INDEX)
    missing = [name for name in names if not (folder / name).is_file()]
    if missing:
        more = f" and {len(missing) - 1} more" if len(missing) > 1 else ""
        raise ModelLoadError(f"{folder / INDEX} names {one_line(missing[0])}{more}, which is not there")
    return tuple(folder / name for name in names)


def indexed_files(index: Path) -> list[str]:
    """The names of the files that an index names.

    Raises:
        ModelLoadError: it is no index.
    """
    weight_map = read_json(index).get("weight_map")
    if not isinstance(weight_map, dict) or not weight_map or not all(isinstance(v, str) for v in weight_map.values()):
        raise ModelLoadError(f"{index}: weight_map must map tensor names to file names")
    names = sorted(set(weight_map.values()))
    for name in names:
        if Path(name).name != name or "\0" in name or not name.endswith(".safetensors"):
            raise ModelLoadError(f"{index}: {short(name)} is not a safetensors file beside the index")
    return names


def check_header(path: Path) -> dict[str, dict[str, Any]]:
    """The header's tensors, after checking it against the file's size.

    Raises:
        ModelLoadError: naming file and tensor.
    """

    def fail(what: str) -> ModelLoadError:
        return ModelLoadError(f"{path} is not a usable safetensors file: {one_line(what)}")

    refuse_pointer(path)
    try:
        size = path.stat().st_size
        with path.open("rb") as file:
            length = int.from_bytes(file.read(8), "little")
            if size < 8 or length > min(size - 8, _MAX_HEADER_BYTES):
                raise fail(f"it says its header has {length} bytes, the file has {size}")
            header = json.loads(file.read(length))
    except OSError as error:
        raise unreadable(path, error) from None
    except RecursionError:
        raise fail("its header is nested too deeply") from None
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
            raise fail(f"the entry of tensor {name} is malformed: {short(entry)}") from None
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
    """Tensors of one or more checked files. At most two files are mapped at a time, the ones used last."""

    def __init__(self, paths: tuple[Path, ...], also: tuple[str, ...] = ()) -> None:
        """Open checked files.

        Args:
            paths: the files.
            also: types of tensors that are read beside plain floats.
        """
        self._file_of: dict[str, Path] = {}
        self._entries: dict[str, dict[str, Any]] = {}
        self._files = len(paths)
        self._seen: set[Path] = set()
        for path in paths:
            for name, entry in check_header(path).items():
                if name in self._file_of:
                    raise ModelLoadError(f"tensor {one_line(name)} is in both {self._file_of[name]} and {path}")
                if entry["dtype"] not in (*_WEIGHT_TYPES, *also):
                    raise ModelLoadError(
                        f"{path}: tensor {one_line(name)} has type {entry['dtype']}; "
                        f"supported: {', '.join(_WEIGHT_TYPES)}"
                    )
                self._file_of[name] = path
                self._entries[name] = entry
        self._open: dict[Path, Any] = {}

    def names(self) -> frozenset[str]:
        return frozenset(self._entries)

    def shape(self, name: str) -> tuple[int, ...]:
        return tuple(self._entries[name]["shape"])

    def kind(self, name: str) -> str:
        """The type as the file names it, e.g. BF16."""
        kind: str = self._entries[name]["dtype"]
        return kind

    def phase(self) -> str:
        return "loading weights" + (f", file {len(self._seen) or 1} of {self._files}" if self._files > 1 else "")

    def raw(self, name: str) -> torch.Tensor:
        """As it is stored, in the memory of the mapped file, which stays mapped as long as it lives."""
        from safetensors import SafetensorError

        path = self._file_of[name]
        try:
            tensor: torch.Tensor = self._opened(path).get_tensor(name)
        except (SafetensorError, OSError) as error:
            raise ModelLoadError(f"{path} is not a usable safetensors file: tensor {name}: {error}") from None
        return tensor

    def get(self, name: str, dtype: torch.dtype) -> torch.Tensor:
        return self.raw(name).to(dtype).contiguous()

    def stored(self, name: str) -> None:
        """None: what is not plain numbers is for the sources that stand before this one."""
        return

    def _opened(self, path: Path) -> Any:
        from safetensors import safe_open

        file = self._open.pop(path, None)
        if file is None:
            if len(self._open) == _MOST_OPEN:
                del self._open[next(iter(self._open))]
            file = safe_open(path, framework="pt")
            self._seen.add(path)
        self._open[path] = file  # the last one used is the last to be closed
        return file

    def close(self) -> None:
        """Unmaps the files."""
        self._open.clear()
