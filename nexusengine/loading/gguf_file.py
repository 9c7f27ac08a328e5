"""Reading GGUF: a checked header, geometry, and tensors under their Hugging Face names. numpy only.

The header is read here and not with the gguf package's reader: every count, length and offset is checked against the
file's size before it is believed, and a vocabulary of 50,000 strings is read in 0.1 s instead of 5. Dequantisation is
the gguf package's.
"""

from __future__ import annotations

import mmap
import re
import struct
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from nexusengine.errors import ModelLoadError
from nexusengine.model_config import ModelConfig, RopeScaling

SUPPORTED_TYPES = ("F32", "F16", "BF16", "Q8_0", "Q4_0", "Q4_1", "Q5_0", "Q5_1", "Q4_K", "Q6_K")
_SCALARS = {0: "<B", 1: "<b", 2: "<H", 3: "<h", 4: "<I", 5: "<i", 6: "<f", 7: "<?", 10: "<Q", 11: "<q", 12: "<d"}
_STRING, _ARRAY = 8, 9
_MAX_ENTRIES, _MAX_DIMENSIONS = 1 << 20, 4
_ROPE_FACTORS = "rope_freqs.weight"
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
class GGUFTensor:
    """Where a tensor lies. shape as in torch (rows first); kind: the name of its GGML type."""

    shape: tuple[int, ...]
    kind: str
    offset: int
    nbytes: int


@dataclass(frozen=True, slots=True)
class Q4Blocks:
    """A matrix `[n, k]` in blocks of 32 numbers of 4 bits along k: number = scale * q + minimum.

    q u1 `[n, k]`, 0 .. 15; scale, minimum f2 `[n, k / 32]`.
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


class _Cursor:
    """Reads little-endian values and never past the end."""

    def __init__(self, data: mmap.mmap, path: Path) -> None:
        self.data, self.path, self.at = data, path, 0

    def fail(self, what: str) -> ModelLoadError:
        return ModelLoadError(f"{self.path} is not a usable GGUF file: {what}")

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


class GGUFFile:
    """An open GGUF file. metadata: its key-value pairs; tensors: by Hugging Face name."""

    def __init__(self, path: Path) -> None:
        self.path = path
        try:
            with path.open("rb") as file:
                self._data = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
        except (OSError, ValueError) as error:
            raise ModelLoadError(f"cannot read {path}: {error}") from None
        self.metadata: dict[str, Any] = {}
        self.tensors: dict[str, GGUFTensor] = {}
        self._read_header()

    def _read_header(self) -> None:
        cursor = _Cursor(self._data, self.path)
        magic = cursor.take(4, "the magic number")
        if magic != b"GGUF":
            raise cursor.fail(f"it begins with {magic!r} instead of b'GGUF'")
        version = cursor.scalar("<I", "the version")
        if version not in (2, 3):
            raise cursor.fail(f"version {version} is not supported; known: 2, 3")
        tensor_count, pair_count = cursor.count("the tensor count"), cursor.count("the metadata count")
        for _ in range(pair_count):
            key = cursor.string("a metadata key")
            self.metadata[key] = cursor.value(cursor.scalar("<I", f"the type of {key}"), key)
        infos = [self._read_tensor_info(cursor) for _ in range(tensor_count)]
        alignment = self.metadata.get("general.alignment", 32)
        if not isinstance(alignment, int) or not 0 < alignment <= 1 << 16 or alignment & (alignment - 1):
            raise cursor.fail(f"general.alignment is {alignment!r}")
        start = -(-cursor.at // alignment) * alignment
        for name, tensor in infos:
            offset = start + tensor.offset
            if tensor.offset % alignment or offset + tensor.nbytes > len(self._data):
                raise cursor.fail(
                    f"tensor {name} should lie at bytes {offset} to {offset + tensor.nbytes}, but the file has "
                    f"{len(self._data)} bytes"
                )
            hf_name = _hf_name(name)
            if hf_name in self.tensors:
                raise cursor.fail(f"tensor {name} is there twice")
            self.tensors[hf_name] = GGUFTensor(tensor.shape, tensor.kind, offset, tensor.nbytes)

    @staticmethod
    def _read_tensor_info(cursor: _Cursor) -> tuple[str, GGUFTensor]:
        from gguf.constants import GGML_QUANT_SIZES, GGMLQuantizationType

        name = cursor.string("a tensor's name")
        dimensions = cursor.scalar("<I", f"the dimensions of {name}")
        if not 1 <= dimensions <= _MAX_DIMENSIONS:
            raise cursor.fail(f"tensor {name} has {dimensions} dimensions")
        shape = tuple(cursor.scalar("<Q", f"the shape of {name}") for _ in range(dimensions))[::-1]
        number, offset = cursor.scalar("<I", f"the type of {name}"), cursor.scalar("<Q", f"the offset of {name}")
        try:
            kind = GGMLQuantizationType(number)
        except ValueError:
            raise cursor.fail(f"tensor {name} has the unknown type {number}") from None
        per_block, block_bytes = GGML_QUANT_SIZES[kind]
        elements = 1
        for size in shape:
            elements *= size
        if not 0 < elements < 1 << 48 or shape[-1] % per_block:
            raise cursor.fail(f"tensor {name} of type {kind.name} cannot have the shape {shape}")
        return name, GGUFTensor(shape, kind.name, offset, elements // per_block * block_bytes)

    def array(self, name: str) -> npt.NDArray[np.float32]:
        """A tensor as float32, dequantised, q and k rows in Hugging Face's order. Raises ModelLoadError."""
        from gguf.constants import GGMLQuantizationType
        from gguf.quants import dequantize, quant_shape_to_byte_shape

        tensor = self.tensors[name]
        if tensor.kind not in SUPPORTED_TYPES:
            raise ModelLoadError(
                f"{self.path}: tensor {name} has type {tensor.kind}, which is not supported; "
                f"supported: {', '.join(SUPPORTED_TYPES)}"
            )
        kind = GGMLQuantizationType[tensor.kind]
        raw = np.frombuffer(self._data, np.uint8, tensor.nbytes, tensor.offset)
        if tensor.kind in ("F32", "F16"):
            plain = raw.view(np.float32 if tensor.kind == "F32" else np.float16)
        else:
            plain = dequantize(raw.reshape(quant_shape_to_byte_shape(tensor.shape, kind)), kind)
        return self._in_order(name, plain.astype(np.float32).reshape(tensor.shape))

    def blocks(self, name: str) -> Q4Blocks | None:
        """A matrix of type Q4_0 or Q4_1 as it is stored, rows in Hugging Face's order; None for any other type."""
        tensor = self.tensors[name]
        if tensor.kind not in ("Q4_0", "Q4_1") or len(tensor.shape) != 2:
            return None
        rows, columns = tensor.shape
        header = 1 if tensor.kind == "Q4_0" else 2  # half-precision numbers before the 16 bytes of a block
        raw = np.frombuffer(self._data, np.uint8, tensor.nbytes, tensor.offset)
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
            heads = self._int("attention.head_count")
            return _unpermute(rows, heads if m[1] == "q" else self._int("attention.head_count_kv", heads))
        return rows

    def config(self) -> ModelConfig:
        """Raises ModelLoadError naming the key that is missing, wrong or not supported."""
        architecture = self.metadata.get("general.architecture")
        known = {"llama": "LlamaForCausalLM", "qwen2": "Qwen2ForCausalLM"}
        if architecture not in known:
            raise ModelLoadError(
                f"{self.path}: architecture {architecture!r} is not supported; known: {', '.join(known)}"
            )
        if self._int("expert_count", 0):
            raise ModelLoadError(f"{self.path}: mixture-of-experts models are not supported")
        hidden, heads = self._int("embedding_length"), self._int("attention.head_count")
        kv_heads = self._int("attention.head_count_kv", heads)
        if min(hidden, heads, kv_heads) < 1 or heads % kv_heads:
            raise ModelLoadError(f"{self.path}: {hidden} wide with {heads} heads and {kv_heads} key-value heads")
        head_dim = self._int("attention.key_length", hidden // heads)
        if self._int("rope.dimension_count", head_dim) != head_dim or head_dim % 2:
            raise ModelLoadError(f"{self.path}: rotary embeddings over a part of the head are not supported")
        tokens = self.metadata.get("tokenizer.ggml.tokens", [])
        embedding = self.tensors.get("model.embed_tokens.weight")
        if embedding is None or len(embedding.shape) != 2:
            raise ModelLoadError(f"{self.path}: tensor token_embd.weight is missing or not a matrix")
        if len(tokens) > embedding.shape[0]:
            raise ModelLoadError(f"{self.path}: {len(tokens)} tokens, but {embedding.shape[0]} embeddings")
        eos = [self.metadata.get(f"tokenizer.ggml.{k}_token_id") for k in ("eos", "eot")]
        bos = self.metadata.get("tokenizer.ggml.bos_token_id")
        factors = self.array(_ROPE_FACTORS) if _ROPE_FACTORS in self.tensors else None
        return ModelConfig(
            architecture=known[architecture],
            vocab_size=embedding.shape[0],
            hidden_size=hidden,
            intermediate_size=self._int("feed_forward_length"),
            num_layers=self._int("block_count"),
            num_heads=heads,
            num_kv_heads=kv_heads,
            head_dim=head_dim,
            max_position=self._int("context_length"),
            rms_norm_eps=self._float("attention.layer_norm_rms_epsilon"),
            rope_theta=self._float("rope.freq_base", 10_000.0),
            rope_scaling=self._rope_scaling(),
            rope_factors=None if factors is None else tuple(factors.tolist()),
            tie_embeddings="lm_head.weight" not in self.tensors,
            attention_bias="model.layers.0.self_attn.q_proj.bias" in self.tensors,
            bos_token_id=bos if isinstance(bos, int) else None,
            eos_token_ids=tuple(dict.fromkeys(i for i in eos if isinstance(i, int))),
            dtype="float32",
        )

    def _rope_scaling(self) -> RopeScaling | None:
        kind = self._key("rope.scaling.type", "none")
        if kind == "none":
            return None
        if kind not in ("linear", "yarn"):
            raise ModelLoadError(f"{self.path}: rope.scaling.type {kind!r} is not supported; known: none, linear, yarn")
        original = self._int("rope.scaling.original_context_length", self._int("context_length"))
        attention = self._float("rope.scaling.attn_factor", 0.0) or None
        return RopeScaling(kind, self._float("rope.scaling.factor"), original, attention_factor=attention)

    def _key(self, key: str, default: Any = None) -> Any:
        full = f"{self.metadata['general.architecture']}.{key}"
        value = self.metadata.get(full, default)
        if value is None:
            raise ModelLoadError(f"{self.path}: {full} is missing")
        return value

    def _int(self, key: str, default: int | None = None) -> int:
        value = self._key(key, default)
        if not isinstance(value, int) or isinstance(value, bool) or not 0 <= value < 1 << 31:
            raise ModelLoadError(f"{self.path}: {key} is {value!r}, which is not a size")
        return value

    def _float(self, key: str, default: float | None = None) -> float:
        value = self._key(key, default)
        if not isinstance(value, float) or not 0.0 <= value < 1e12:
            raise ModelLoadError(f"{self.path}: {key} is {value!r}, which is not a sensible number")
        return value


def _hf_name(name: str) -> str:
    if name == _ROPE_FACTORS:
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
