"""config.json of a Hugging Face checkpoint -> ModelConfig. What we cannot compute is refused by name."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from nexusengine.errors import ModelLoadError
from nexusengine.loading.architectures import ARCHITECTURES
from nexusengine.loading.config_keys import refuse_uncomputed
from nexusengine.loading.files import read_json
from nexusengine.loading.json_reader import Reader
from nexusengine.loading.quantization_json import stored_weights
from nexusengine.loading.rope_json import read_rope
from nexusengine.loading.shown import short
from nexusengine.model_config import ModelConfig

_KV_HEADS_BY_DEFAULT = {"MistralForCausalLM": 8, "Qwen2ForCausalLM": 32}
_WINDOW_BY_DEFAULT = 4096
"""Of a Mistral config.json that does not say, and of a Qwen2 one that uses a window and does not say which."""


def read_config(folder: Path) -> ModelConfig:
    """From `folder`/config.json, and the end-of-text ids also from generation_config.json."""
    path = folder / "config.json"
    config = parse_config(read_json(path), str(path))
    generation = folder / "generation_config.json"
    if generation.is_file():
        eos = _ids(read_json(generation).get("eos_token_id"), str(generation))
        merged = tuple(dict.fromkeys(config.eos_token_ids + eos))
        return dataclasses.replace(config, eos_token_ids=merged)
    return config


def parse_config(values: Mapping[str, Any], where: str) -> ModelConfig:
    """The geometry a config.json describes.

    Raises:
        ModelLoadError: naming the key that is missing, wrong or not supported; of several, the architecture first.
    """
    r = Reader(values, where)
    architectures = r.get("architectures", list)
    if not architectures or not isinstance(architectures[0], str):
        raise r.fail(f"architectures is {short(architectures)}; one name is needed")
    architecture = architectures[0]
    if architecture not in ARCHITECTURES:
        raise r.fail(f"architecture {short(architecture)} is not supported; known: {', '.join(sorted(ARCHITECTURES))}")
    stored = stored_weights(r.get("quantization_config", dict, None), where)
    if r.get("compression_config", dict, None) is not None:
        raise r.fail("compression_config is not supported; take a checkpoint with a quantization_config")
    activation = values.get("hidden_act") or "silu"
    if activation not in ("silu", "swish"):
        raise r.fail(f"hidden_act is {short(activation)}; only silu is supported")
    refuse_uncomputed(values, where)
    hidden, heads = r.size("hidden_size"), r.size("num_attention_heads")
    kv_heads = _kv_heads(r, architecture, heads)
    if heads % kv_heads:
        raise r.fail(f"{heads} attention heads cannot share {kv_heads} key-value heads")
    head_dim = r.size("head_dim", hidden // heads)
    if head_dim % 2:
        raise r.fail(f"head_dim is {head_dim}; rotary embeddings need an even one")
    max_position = r.size("max_position_embeddings")
    theta, scaling = read_rope(r, max_position)
    llama = architecture == "LlamaForCausalLM"  # the others have these biases, or have them not, whatever they say
    return ModelConfig(
        architecture=architecture,
        vocab_size=r.size("vocab_size"),
        hidden_size=hidden,
        intermediate_size=r.size("intermediate_size"),
        num_layers=r.size("num_hidden_layers"),
        num_heads=heads,
        num_kv_heads=kv_heads,
        head_dim=head_dim,
        max_position=max_position if scaling is None else scaling.reach(max_position),
        sliding_window=_window(r, architecture),
        rms_norm_eps=r.number("rms_norm_eps", 1e-6),
        rope_theta=theta,
        rope_scaling=scaling,
        tie_embeddings=r.get("tie_word_embeddings", bool, False),
        attention_bias=architecture == "Qwen2ForCausalLM" or (llama and r.get("attention_bias", bool, False)),
        attention_output_bias=llama and r.get("attention_bias", bool, False),
        mlp_bias=llama and r.get("mlp_bias", bool, False),
        bos_token_id=r.get("bos_token_id", int, None),
        eos_token_ids=_ids(values.get("eos_token_id"), where),
        dtype=str(values.get("dtype") or values.get("torch_dtype") or "float32"),
        stored=stored,
    )


def _kv_heads(r: Reader, architecture: str, heads: int) -> int:
    """Without the key, transformers takes a number of its own for the architecture; with null, as many as heads."""
    if "num_key_value_heads" not in r.values and architecture in _KV_HEADS_BY_DEFAULT:
        return _KV_HEADS_BY_DEFAULT[architecture]
    return r.size("num_key_value_heads", heads)


def _window(r: Reader, architecture: str) -> int | None:
    """The sliding window that some layer has, as transformers decides it for the architecture; None for none."""
    layers = r.size("num_hidden_layers")
    kinds = r.get("layer_types", list, None)
    for kind in kinds or ():
        if kind not in ("full_attention", "sliding_attention"):
            raise r.fail(f"layer_types has {short(kind)}, which is not supported; known: full_attention")
    slides = None if kinds is None else "sliding_attention" in kinds[:layers]
    window: int | None = r.size("sliding_window", 0) if r.values.get("sliding_window") else None
    if architecture == "MistralForCausalLM":
        return _WINDOW_BY_DEFAULT if "sliding_window" not in r.values else window
    if architecture == "Qwen2ForCausalLM":
        if not r.get("use_sliding_window", bool, False):
            return None
        window = _WINDOW_BY_DEFAULT if "sliding_window" not in r.values else window
        if slides is None:
            slides = r.get("max_window_layers", int, 28) < layers
    return window if slides else None


def _ids(value: Any, where: str) -> tuple[int, ...]:
    ids = [] if value is None else value if isinstance(value, list) else [value]
    if not all(isinstance(i, int) and not isinstance(i, bool) and 0 <= i < 2**31 for i in ids):
        raise ModelLoadError(f"{where}: eos_token_id is {short(value)}; token ids are whole numbers")
    return tuple(ids)
