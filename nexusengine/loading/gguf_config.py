"""GGUF metadata -> ModelConfig, by llama.cpp's rules for the architectures llama and qwen2.

What we cannot compute is refused by name.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from nexusengine.errors import ModelLoadError
from nexusengine.loading.gguf_header import GGUFTensor
from nexusengine.loading.shown import short
from nexusengine.model_config import ModelConfig, RopeScaling

ROPE_FACTORS = "rope_freqs.weight"
ARCHITECTURES = {"llama": "LlamaForCausalLM", "qwen2": "Qwen2ForCausalLM"}
_NOT_COMPUTED = {
    "attention.causal": (True,), "attention.clamp_kqv": (0.0,), "attention.max_alibi_bias": (0.0,),
    "attention.scale": (0.0,), "attention.temperature_scale": (0.0,), "attn_logit_softcapping": (0.0,),
    "decoder_start_token_id": (), "embedding_scale": (0.0, 1.0), "expert_count": (0,),
    "final_logit_softcapping": (0.0,), "full_attention_interval": (), "logit_scale": (0.0, 1.0), "pooling_type": (0,),
    "residual_scale": (0.0, 1.0), "rope.dimension_sections": (), "rope.scaling.alpha": (0.0,),
    "use_parallel_residual": (False,),
}  # fmt: skip
"""Keys of other architectures that change what is computed, and the values with which they change nothing."""


class _Metadata:
    """Typed access to the keys of the file's architecture, with errors that name file and key."""

    def __init__(self, values: Mapping[str, Any], path: Path) -> None:
        self.values, self.path = values, path
        self.prefix = values.get("general.architecture")

    def fail(self, what: str) -> ModelLoadError:
        return ModelLoadError(f"{self.path}: {what}")

    def get(self, key: str, default: Any = None) -> Any:
        value = self.values.get(f"{self.prefix}.{key}", default)
        if value is None:
            raise self.fail(f"{self.prefix}.{key} is missing")
        return value

    def size(self, key: str, default: int | None = None) -> int:
        """A whole number; a list with one for each layer where all are the same."""
        value = self.get(key, default)
        if isinstance(value, list) and len(set(map(str, value))) == 1:
            value = value[0]
        if not isinstance(value, int) or isinstance(value, bool) or not 0 <= value < 1 << 31:
            raise self.fail(f"{key} is {short(value)}, which is not a size")
        return value

    def number(self, key: str, default: float | None = None) -> float:
        """A number above 0."""
        value = self.get(key, default)
        if not isinstance(value, float) or not 0.0 < value < 1e12:
            raise self.fail(f"{key} is {short(value)}, which is out of range")
        return value


def parse_metadata(
    values: Mapping[str, Any],
    tensors: Mapping[str, GGUFTensor],
    array: Callable[[str], npt.NDArray[np.float32]],
    path: Path,
) -> ModelConfig:
    """The geometry that GGUF metadata describes.

    Args:
        values: the metadata.
        tensors: by Hugging Face name.
        array: reads one of them.
        path: of the file, for errors.

    Raises:
        ModelLoadError: naming the key that is missing, wrong or not supported; of several, the architecture first.
    """
    m = _Metadata(values, path)
    architecture = _architecture(m)
    hidden, heads, kv_heads, head_dim = _head_sizes(m)
    vocab_size = _vocab_size(m, tensors)
    eos = [values.get(f"tokenizer.ggml.{k}_token_id") for k in ("eos", "eot")]
    bos = values.get("tokenizer.ggml.bos_token_id")
    theta, scaling = m.number("rope.freq_base", 10_000.0), _rope_scaling(m)
    fault = scaling.fault(theta) if scaling else ""
    if fault or not theta >= 1e-3:
        raise m.fail(fault or f"rope.freq_base is {theta:g}, which is out of range")
    window = m.size("attention.sliding_window", 0)
    sizes = {"feed_forward_length": m.size("feed_forward_length"), "block_count": m.size("block_count")}
    sizes["context_length"] = context = m.size("context_length")
    for key, size in sizes.items():
        if size < 1:
            raise m.fail(f"{key} is {size}, which is not a size")
    return ModelConfig(
        architecture=architecture,
        vocab_size=vocab_size,
        hidden_size=hidden,
        intermediate_size=sizes["feed_forward_length"],
        num_layers=sizes["block_count"],
        num_heads=heads,
        num_kv_heads=kv_heads,
        head_dim=head_dim,
        max_position=context if scaling is None else scaling.reach(context),
        sliding_window=window or None,
        rms_norm_eps=m.number("attention.layer_norm_rms_epsilon"),
        rope_theta=theta,
        rope_scaling=scaling,
        rope_factors=_rope_factors(m, tensors, array, head_dim),
        tie_embeddings="lm_head.weight" not in tensors,
        attention_bias="model.layers.0.self_attn.q_proj.bias" in tensors,
        attention_output_bias="model.layers.0.self_attn.o_proj.bias" in tensors,
        mlp_bias="model.layers.0.mlp.down_proj.bias" in tensors,
        bos_token_id=bos if isinstance(bos, int) else None,
        eos_token_ids=tuple(dict.fromkeys(i for i in eos if isinstance(i, int))),
        dtype="float32",
    )


def _architecture(m: _Metadata) -> str:
    """The model's architecture, by its name in config.json.

    Raises:
        ModelLoadError: the file holds no model, or one that is not supported.
    """
    kind = m.values.get("general.type", "model")
    if kind != "model":
        raise m.fail(f"it holds no model: its general.type is {short(kind)}")
    if not isinstance(m.prefix, str) or m.prefix not in ARCHITECTURES:
        raise m.fail(f"architecture {short(m.prefix)} is not supported; known: {', '.join(ARCHITECTURES)}")
    for key, harmless in _NOT_COMPUTED.items():
        value = m.values.get(f"{m.prefix}.{key}")
        if value is not None and value not in harmless:
            what = (
                "; mixture-of-experts models are not supported" if key == "expert_count" else ", which is not supported"
            )
            raise m.fail(f"{m.prefix}.{key} is {short(value)}{what}")
    return ARCHITECTURES[m.prefix]


def _head_sizes(m: _Metadata) -> tuple[int, int, int, int]:
    """Hidden size, heads, KV heads, head dimension."""
    hidden, heads = m.size("embedding_length"), m.size("attention.head_count")
    kv_heads = m.size("attention.head_count_kv", heads)
    if min(hidden, heads, kv_heads) < 1 or heads % kv_heads:
        raise m.fail(f"an embedding of {hidden}, {heads} heads and {kv_heads} key-value heads do not fit together")
    head_dim = m.size("attention.key_length", hidden // heads)
    if m.size("attention.value_length", head_dim) != head_dim:
        raise m.fail("keys and values of different lengths are not supported")
    if m.size("rope.dimension_count", head_dim) != head_dim or head_dim % 2 or not head_dim:
        raise m.fail("rotary embeddings over a part of the head are not supported")
    return hidden, heads, kv_heads, head_dim


def _vocab_size(m: _Metadata, tensors: Mapping[str, GGUFTensor]) -> int:
    tokens = m.values.get("tokenizer.ggml.tokens", [])
    embedding = tensors.get("model.embed_tokens.weight")
    if embedding is None or len(embedding.shape) != 2:
        raise m.fail("tensor token_embd.weight is missing or not a matrix")
    if not isinstance(tokens, list) or len(tokens) > embedding.shape[0]:
        many = len(tokens) if isinstance(tokens, list) else "no list of"
        raise m.fail(f"it has {many} tokens, but {embedding.shape[0]} embeddings")
    return embedding.shape[0]


def _rope_scaling(m: _Metadata) -> RopeScaling | None:
    """The scaling of rotary embeddings, by llama.cpp's rules.

    A factor without a type is linear; the factor may be under its old name; attn_factor multiplies whatever else there
    is, for yarn 1 + 0.1 ln(factor).
    """
    kind = m.get("rope.scaling.type", "linear")
    if kind not in ("none", "linear", "yarn"):
        raise m.fail(f"rope.scaling.type {short(kind)} is not supported; known: none, linear, yarn")
    factor = m.number("rope.scaling.factor", m.number("rope.scale_linear", 1.0))
    attention = m.number("rope.scaling.attn_factor", 1.0)
    if kind == "none":
        factor = 1.0
    if factor == attention == 1.0 and kind != "yarn":
        return None
    if kind != "yarn":
        return RopeScaling("linear", factor, attention_factor=attention)
    original = m.size("rope.scaling.original_context_length", m.size("context_length"))
    if original < 1:
        raise m.fail("rope.scaling.original_context_length is 0, which is not a size")
    if factor > 1:
        attention *= 1 + 0.1 * math.log(factor)
    return RopeScaling("yarn", factor, original, attention_factor=attention)


def _rope_factors(
    m: _Metadata, tensors: Mapping[str, GGUFTensor], array: Callable[[str], npt.NDArray[np.float32]], head_dim: int
) -> tuple[float, ...] | None:
    if ROPE_FACTORS not in tensors:
        return None
    factors = tuple(array(ROPE_FACTORS).reshape(-1).tolist())
    if len(factors) != head_dim // 2 or not all(0.0 < factor < math.inf for factor in factors):
        raise m.fail(f"tensor {ROPE_FACTORS} must hold {head_dim // 2} numbers above 0")
    return factors
