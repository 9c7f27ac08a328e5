"""Reading GGUF: tensors under their Hugging Face names, of one file or of all parts of a split one. numpy only.

The header is read by `gguf_header` and not with the gguf package's reader, which believes what it reads and takes 5 s
for a vocabulary of 50,000 strings. Dequantisation is the gguf package's.
"""

from __future__ import annotations

import mmap
import re
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from nexusengine.errors import ModelLoadError
from nexusengine.loading.files import refuse_pointer, unreadable
from nexusengine.loading.gguf_config import ROPE_FACTORS, parse_metadata
from nexusengine.loading.gguf_header import GGUFTensor, read_header
from nexusengine.loading.gguf_names import part_names
from nexusengine.loading.shown import one_line, short
from nexusengine.model_config import ModelConfig

_MAX_PARTS = 1 << 16

_NAMES = {
    "token_embd": "model.embed_tokens",
    "output_norm": "model.norm",
    "output": "lm_head",
}
_BLOCK_NAMES = {
    "attn_norm": "input_layernorm",
    "ffn_norm": "post_attention_layernorm",
    "attn_q": "self_attn.q_proj",
    "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj",
    "attn_output": "self_attn.o_proj",
    "ffn_gate": "mlp.gate_proj",
    "ffn_up": "mlp.up_proj",
    "ffn_down": "mlp.down_proj",
}


@dataclass(frozen=True, slots=True)
class Q4Blocks:
    """A matrix `[n, k]` in blocks of 32 numbers of 4 bits along k: number = scale * q + minimum.

    Attributes:
        q: u1 `[n, k]`, 0 .. 15.
        scale: f2 `[n, k / 32]`.
        minimum: f2 `[n, k / 32]`.
    """

    q: npt.NDArray[np.uint8]
    scale: npt.NDArray[np.float16]
    minimum: npt.NDArray[np.float16]

    @staticmethod
    def join(parts: list[Q4Blocks]) -> Q4Blocks:
        """Matrices of the same width, one below the other."""
        return Q4Blocks(
            np.concatenate([part.q for part in parts]),
            np.concatenate([part.scale for part in parts]),
            np.concatenate([part.minimum for part in parts]),
        )

    def to(self, device: object) -> Q4Blocks:
        """Itself: it is for the host's kernels alone."""
        return self

    def scaled(self, factor: float) -> Q4Blocks:
        """All numbers times `factor`."""
        return Q4Blocks(self.q, self.scale * np.float16(factor), self.minimum * np.float16(factor))


def supported_types() -> tuple[str, ...]:
    """The names of all GGML types that the gguf package turns into numbers."""
    from gguf import quants
    from gguf.constants import GGMLQuantizationType

    registry = quants._type_traits  # the package has no public name for it
    return tuple(kind.name for kind in GGMLQuantizationType if kind in registry or kind.name in ("F32", "F16"))


class GGUFFile:
    """An open GGUF file, or all files of a split one.

    Attributes:
        paths: the files.
        metadata: the key-value pairs of the first.
        tensors: by Hugging Face name.
    """

    def __init__(self, path: Path) -> None:
        """Open and check the file.

        Args:
            path: the file, or any part of a split one.

        Raises:
            ModelLoadError: naming file and reason.
        """
        data = _mapped(path)
        self.metadata, tensors = read_header(data, path)
        self.paths = _all_parts(path, self.metadata.get("split.count", 0))
        self.path = self.paths[0]
        if self.path != path:  # the first part has the metadata
            data = _mapped(self.path)
            self.metadata, tensors = read_header(data, self.path)
        self.tensors: dict[str, GGUFTensor] = {}
        self._data = [data]
        self._add(tensors, 0)
        for i, part in enumerate(self.paths[1:], 1):
            self._data.append(_mapped(part))
            metadata, tensors = read_header(self._data[i], part)
            if metadata.get("split.no", i) != i:
                raise ModelLoadError(
                    f"{part} says that it is part {short(metadata['split.no'])} of the model, counted from 0"
                )
            self._add(tensors, i)
        expected = self.metadata.get("split.tensors.count")
        if len(self.paths) > 1 and isinstance(expected, int) and expected != len(self.tensors):
            raise ModelLoadError(f"{path}: the parts hold {len(self.tensors)} tensors instead of {expected}")
        self._config: ModelConfig | None = None

    def _add(self, tensors: dict[str, GGUFTensor], part: int) -> None:
        for name, tensor in tensors.items():
            hf_name = _hf_name(name)
            if hf_name in self.tensors:
                raise ModelLoadError(f"{self.paths[part]}: tensor {one_line(name)} is there twice")
            self.tensors[hf_name] = replace(tensor, part=part)

    def raw(self, tensor: GGUFTensor) -> npt.NDArray[np.uint8]:
        """The bytes of a tensor, in the file's mapping."""
        return np.frombuffer(self._data[tensor.part], np.uint8, tensor.nbytes, tensor.offset)

    def array(self, name: str) -> npt.NDArray[np.float32]:
        """A tensor as float32, dequantised, q and k rows in Hugging Face's order.

        Raises:
            ModelLoadError: it cannot be read.
        """
        from gguf.constants import GGMLQuantizationType
        from gguf.quants import dequantize, quant_shape_to_byte_shape

        tensor = self.tensors[name]
        if tensor.kind not in (known := supported_types()):
            raise ModelLoadError(
                f"{self.path}: tensor {one_line(name)} has type {tensor.kind}, which is not supported; "
                f"supported: {', '.join(known)}"
            )
        kind = GGMLQuantizationType[tensor.kind]
        raw = self.raw(tensor)
        if tensor.kind in ("F32", "F16"):
            plain = raw.view(np.float32 if tensor.kind == "F32" else np.float16)
        else:
            plain = dequantize(raw.reshape(quant_shape_to_byte_shape(tensor.shape, kind)), kind)
        return self._in_order(name, plain.astype(np.float32, copy=tensor.kind == "F32").reshape(tensor.shape))

    def blocks(self, name: str) -> Q4Blocks | None:
        """A matrix of type Q4_0 or Q4_1 as it is stored, rows in Hugging Face's order; None for any other type."""
        tensor = self.tensors[name]
        if tensor.kind not in ("Q4_0", "Q4_1") or len(tensor.shape) != 2:
            return None
        rows, columns = tensor.shape
        header = 1 if tensor.kind == "Q4_0" else 2  # half-precision numbers before the 16 bytes of a block
        raw = self.raw(tensor)
        raw = self._in_order(name, raw.reshape(rows, columns // 32, 2 * header + 16))
        numbers = raw[..., 2 * header :]
        q = np.concatenate([numbers & 15, numbers >> 4], axis=-1).reshape(rows, columns)
        heads = np.ascontiguousarray(raw[..., : 2 * header]).view(np.float16)
        scale = heads[..., 0]
        minimum = -8 * scale if tensor.kind == "Q4_0" else heads[..., 1]
        return Q4Blocks(q, np.ascontiguousarray(scale), np.ascontiguousarray(minimum))

    def _in_order(self, name: str, rows: npt.NDArray[Any]) -> npt.NDArray[Any]:
        """Rows of q and k, which llama.cpp permutes, in Hugging Face's order; others as they are."""
        if self.metadata.get("general.architecture") == "llama" and (m := re.search(r"\.(q|k)_proj\.", name)):
            heads = self.config().num_heads if m[1] == "q" else self.config().num_kv_heads
            return _unpermute(rows, heads)
        return rows

    def config(self) -> ModelConfig:
        """The model's geometry.

        Raises:
            ModelLoadError: naming the key that is missing, wrong or not supported.
        """
        if self._config is None:
            self._config = parse_metadata(self.metadata, self.tensors, self.array, self.path)
        return self._config


def _all_parts(path: Path, count: Any) -> tuple[Path, ...]:
    """The files of a model of which one is `path`.

    Raises:
        ModelLoadError: naming a part that is missing.
    """
    if not isinstance(count, int) or not 0 <= count <= _MAX_PARTS:
        raise ModelLoadError(f"{path}: split.count is {short(count)}, which is not a number of files")
    if count < 2:
        return (path,)
    parts = tuple(path.with_name(name) for name in part_names(path.name, count))
    missing = [part.name for part in parts if not part.is_file()]
    if missing:
        more = f" and {len(missing) - 1} more" if len(missing) > 1 else ""
        raise ModelLoadError(f"{path} is one of {count} parts of a model; missing: {missing[0]}{more}")
    return parts


def _mapped(path: Path) -> mmap.mmap:
    refuse_pointer(path)
    try:
        with path.open("rb") as file:
            return mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
    except OSError as error:
        raise unreadable(path, error) from None
    except ValueError as error:  # it cannot be mapped
        raise ModelLoadError(f"cannot read {path}: {error}") from None


def _hf_name(name: str) -> str:
    if name == ROPE_FACTORS:
        return name
    stem, _, suffix = name.rpartition(".")
    if stem in _NAMES:
        return f"{_NAMES[stem]}.{suffix}"
    block = re.fullmatch(r"blk\.(\d+)\.(\w+)", stem)
    if block and block[2] in _BLOCK_NAMES:
        return f"model.layers.{block[1]}.{_BLOCK_NAMES[block[2]]}.{suffix}"
    return name


def _unpermute(value: npt.NDArray[Any], heads: int) -> npt.NDArray[Any]:
    """llama.cpp interleaves the two halves of each head's rows for its own rotary embedding; undo that."""
    rows, rest = value.shape[0], value.shape[1:]
    if heads < 1 or rows % (2 * heads):
        raise ModelLoadError(f"{rows} rows cannot be split over {heads} heads of even size")
    return value.reshape(heads, rows // heads // 2, 2, *rest).swapaxes(1, 2).reshape(rows, *rest)
