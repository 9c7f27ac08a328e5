"""Whole tiny Llama and Qwen2 models as GGUF files, the same at every call, which llama.cpp can run too."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import gguf
import numpy as np

VOCABULARY, HIDDEN, HEADS, KV_HEADS, LAYERS, WIDE = 64, 256, 4, 2, 2, 512
PROMPT = [(7 * i * i + 3 * i + 5) % VOCABULARY for i in range(200)]
ROPE: dict[str, dict[str, Any]] = {
    "plain": {},
    "factor without a type": {"rope.scaling.factor": 4.0},
    "old name of the factor": {"rope.scale_linear": 8.0},
    "both names": {"rope.scale_linear": 8.0, "rope.scaling.factor": 2.0},
    "linear": {"rope.scaling.type": "linear", "rope.scaling.factor": 4.0},
    "none with a factor": {"rope.scaling.type": "none", "rope.scaling.factor": 4.0},
    "linear with attn_factor": {
        "rope.scaling.type": "linear",
        "rope.scaling.factor": 4.0,
        "rope.scaling.attn_factor": 1.2,
    },
    "attn_factor alone": {"rope.scaling.attn_factor": 1.2},
    "yarn": {"rope.scaling.type": "yarn", "rope.scaling.factor": 4.0, "rope.scaling.original_context_length": 64},
    "yarn without original length": {"rope.scaling.type": "yarn", "rope.scaling.factor": 4.0},
    "yarn with attn_factor": {
        "rope.scaling.type": "yarn",
        "rope.scaling.factor": 4.0,
        "rope.scaling.original_context_length": 64,
        "rope.scaling.attn_factor": 1.2,
    },
    "yarn with keys of other architectures": {
        "rope.scaling.type": "yarn",
        "rope.scaling.factor": 4.0,
        "rope.scaling.original_context_length": 64,
        "rope.scaling.yarn_log_multiplier": 0.5,
        "rope.scaling.yarn_beta_fast": 16.0,
        "rope.scaling.yarn_beta_slow": 2.0,
        "rope.scaling.yarn_ext_factor": 0.5,
        "rope.scaling.yarn_attn_factor": 3.0,
    },
    "yarn without a factor": {"rope.scaling.type": "yarn", "rope.scaling.original_context_length": 64},
    "base": {"rope.freq_base": 500.0},
    "factors": {"rope_freqs": True},
    "factors and linear": {"rope_freqs": True, "rope.scaling.factor": 2.0},
    "factors and yarn": {
        "rope_freqs": True,
        "rope.scaling.type": "yarn",
        "rope.scaling.factor": 4.0,
        "rope.scaling.original_context_length": 64,
    },
    "a window, which llama.cpp does not read here": {"attention.sliding_window": 512},
    "tied": {"tied": True},
    "biases": {"biases": True},
    "heads wider than the model": {
        "attention.key_length": 96,
        "attention.value_length": 96,
        "rope.dimension_count": 96,
    },
    "sizes as lists": {"attention.head_count_kv": [KV_HEADS] * LAYERS, "feed_forward_length": [WIDE] * LAYERS},
}


def tensors(architecture: str = "llama", dim: int = HIDDEN // HEADS, biases: bool = False) -> dict[str, np.ndarray]:
    """By llama.cpp's names, float32. dim: of a head. biases: of every map, where Llama may have them."""
    rng = np.random.default_rng(11)
    shapes: dict[str, tuple[int, ...]] = {
        "token_embd.weight": (VOCABULARY, HIDDEN),
        "output.weight": (VOCABULARY, HIDDEN),
    }
    for i in range(LAYERS):
        shapes |= {
            f"blk.{i}.attn_q.weight": (dim * HEADS, HIDDEN),
            f"blk.{i}.attn_k.weight": (dim * KV_HEADS, HIDDEN),
            f"blk.{i}.attn_v.weight": (dim * KV_HEADS, HIDDEN),
            f"blk.{i}.attn_output.weight": (HIDDEN, dim * HEADS),
            f"blk.{i}.ffn_gate.weight": (WIDE, HIDDEN),
            f"blk.{i}.ffn_up.weight": (WIDE, HIDDEN),
            f"blk.{i}.ffn_down.weight": (HIDDEN, WIDE),
        }
        if architecture == "qwen2" or biases:
            shapes |= {f"blk.{i}.attn_{p}.bias": (dim * (HEADS if p == "q" else KV_HEADS),) for p in "qkv"}
        if biases:
            shapes |= {f"blk.{i}.{n}.bias": (HIDDEN,) for n in ("attn_output", "ffn_down")}
            shapes |= {f"blk.{i}.ffn_{n}.bias": (WIDE,) for n in ("gate", "up")}
    found = {name: (rng.standard_normal(shape) / 12).astype(np.float32) for name, shape in shapes.items()}
    for name in ("output_norm", *(f"blk.{i}.{n}" for i in range(LAYERS) for n in ("attn_norm", "ffn_norm"))):
        found[f"{name}.weight"] = (rng.random(HIDDEN) + 0.5).astype(np.float32)
    return found


def write(path: Path, architecture: str = "llama", kind: str = "F32", split: int = 0, **metadata: Any) -> Path:
    """A model of the given metadata, by the architecture's keys. rope_freqs: with a tensor of that name; biases: with
    those too; tied: without a head.

    kind: of all matrices, by gguf's own quantisation. split: tensors in a file, the rest in further ones.
    """
    writer = gguf.GGUFWriter(str(path), architecture, split_max_tensors=split)
    values: dict[str, Any] = {
        "block_count": LAYERS,
        "context_length": 512,
        "embedding_length": HIDDEN,
        "feed_forward_length": WIDE,
        "attention.head_count": HEADS,
        "attention.head_count_kv": KV_HEADS,
        "attention.layer_norm_rms_epsilon": 1e-5,
        "vocab_size": VOCABULARY,
    } | metadata
    freqs, biases, tied = (values.pop(key, False) for key in ("rope_freqs", "biases", "tied"))
    weights = tensors(architecture, values.get("attention.key_length", HIDDEN // HEADS), biases)
    if tied:
        del weights["output.weight"]
    for key, value in values.items():
        if isinstance(value, list):
            writer.add_array(f"{architecture}.{key}", value)
        else:
            adders: dict[type, Callable[[str, Any], None]] = {
                str: writer.add_string,
                float: writer.add_float32,
                bool: writer.add_bool,
            }
            add = adders.get(type(value), writer.add_uint32)
            add(f"{architecture}.{key}", value)
    writer.add_tokenizer_model("no_vocab")
    for name, tensor in weights.items():
        if kind == "F32" or tensor.ndim == 1:
            writer.add_tensor(name, tensor)
        else:
            quantised = gguf.GGMLQuantizationType[kind]
            writer.add_tensor(name, gguf.quants.quantize(tensor, quantised), raw_dtype=quantised)
    if freqs:
        writer.add_tensor("rope_freqs.weight", np.linspace(1.0, 6.0, HIDDEN // HEADS // 2).astype(np.float32))
    for step in (writer.write_header_to_file, writer.write_kv_data_to_file, writer.write_tensors_to_file, writer.close):
        step()
    return path
