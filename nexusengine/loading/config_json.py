"""config.json of a Hugging Face checkpoint -> ModelConfig. What we cannot compute is refused by name."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from nexusengine.errors import ModelLoadError
from nexusengine.loading.quantization_json import stored_weights
from nexusengine.model_config import ModelConfig, RopeScaling

_MISSING = object()


class _Reader:
    """Typed access to a JSON object, with errors that name the file and the key."""

    def __init__(self, values: Mapping[str, Any], where: str) -> None:
        self.values, self.where = values, where

    def get(self, key: str, kind: type | tuple[type, ...], default: Any = _MISSING) -> Any:
        value = self.values.get(key)
        if value is None:
            if default is _MISSING:
                raise ModelLoadError(f"{self.where}: {key} is missing")
            return default
        if not isinstance(value, kind) or (isinstance(value, bool) and kind is not bool):
            raise ModelLoadError(f"{self.where}: {key} is {value!r}, which is not of the right type")
        return value

    def size(self, key: str, default: Any = _MISSING) -> int:
        value: int = self.get(key, int, default)
        if not 1 <= value < 2**31:
            raise ModelLoadError(f"{self.where}: {key} is {value}, which is not a size")
        return value

    def number(self, key: str, default: Any = _MISSING) -> Any:
        value = self.get(key, (int, float), default)
        return value if value is None else float(value)


def read_json(path: Path) -> dict[str, Any]:
    """A JSON object from a file. Raises ModelLoadError."""
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise ModelLoadError(f"cannot read {path}: {error.strerror}") from None
    except (ValueError, RecursionError) as error:
        raise ModelLoadError(f"{path} is not valid JSON: {error}") from None
    if not isinstance(value, dict):
        raise ModelLoadError(f"{path} does not hold a JSON object")
    return value


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
    """Raises ModelLoadError naming the key that is missing, wrong or not supported."""
    r = _Reader(values, where)
    architectures = r.get("architectures", list)
    if not architectures or not isinstance(architectures[0], str):
        raise ModelLoadError(f"{where}: architectures is {architectures!r}; one name is needed")
    activation = values.get("hidden_act", "silu")
    if activation not in ("silu", "swish"):
        raise ModelLoadError(f"{where}: hidden_act is {activation!r}; only silu is supported")
    max_position = r.size("max_position_embeddings")
    window = r.get("sliding_window", int, None)
    if window is not None and values.get("use_sliding_window", True) and window < max_position:
        raise ModelLoadError(f"{where}: sliding_window is {window}; sliding-window attention is not supported")
    hidden, heads = r.size("hidden_size"), r.size("num_attention_heads")
    kv_heads = r.size("num_key_value_heads", heads)
    if heads % kv_heads:
        raise ModelLoadError(f"{where}: {heads} attention heads cannot share {kv_heads} key-value heads")
    head_dim = r.size("head_dim", hidden // heads)
    if head_dim % 2:
        raise ModelLoadError(f"{where}: head_dim is {head_dim}; rotary embeddings need an even one")
    theta, scaling = _rope(r, max_position)
    qwen2 = architectures[0] == "Qwen2ForCausalLM"
    return ModelConfig(
        architecture=architectures[0],
        vocab_size=r.size("vocab_size"),
        hidden_size=hidden,
        intermediate_size=r.size("intermediate_size"),
        num_layers=r.size("num_hidden_layers"),
        num_heads=heads,
        num_kv_heads=kv_heads,
        head_dim=head_dim,
        max_position=max_position,
        rms_norm_eps=r.number("rms_norm_eps", 1e-6),
        rope_theta=theta,
        rope_scaling=scaling,
        tie_embeddings=r.get("tie_word_embeddings", bool, False),
        attention_bias=True if qwen2 else r.get("attention_bias", bool, False),
        attention_output_bias=False if qwen2 else r.get("attention_bias", bool, False),
        mlp_bias=r.get("mlp_bias", bool, False),
        bos_token_id=r.get("bos_token_id", int, None),
        eos_token_ids=_ids(values.get("eos_token_id"), where),
        dtype=str(values.get("dtype") or values.get("torch_dtype") or "float32"),
        stored=stored_weights(r.get("quantization_config", dict, None), where),
    )


def _ids(value: Any, where: str) -> tuple[int, ...]:
    ids = [] if value is None else value if isinstance(value, list) else [value]
    if not all(isinstance(i, int) and not isinstance(i, bool) for i in ids):
        raise ModelLoadError(f"{where}: eos_token_id is {value!r}; token ids are whole numbers")
    return tuple(ids)


def _rope(r: _Reader, max_position: int) -> tuple[float, RopeScaling | None]:
    """Base and scaling, in the old spelling (rope_theta, rope_scaling.type) and the new one (rope_parameters)."""
    parameters = r.get("rope_parameters", dict, None) or r.get("rope_scaling", dict, None) or {}
    rope = _Reader(parameters, f"{r.where}: rope_parameters")
    theta = rope.number("rope_theta", None) or r.number("rope_theta", 10_000.0)
    if rope.number("partial_rotary_factor", r.number("partial_rotary_factor", 1.0)) != 1.0:
        raise ModelLoadError(f"{r.where}: partial_rotary_factor is not supported")
    kind = parameters.get("rope_type", parameters.get("type", "default"))
    if kind == "default":
        return theta, None
    if kind not in ("linear", "llama3", "yarn"):
        raise ModelLoadError(f"{r.where}: rope_type {kind!r} is not supported; known: default, linear, llama3, yarn")
    original = rope.size("original_max_position_embeddings", max_position)
    if kind == "llama3":
        return theta, RopeScaling(
            "llama3",
            rope.number("factor"),
            original,
            rope.number("low_freq_factor"),
            rope.number("high_freq_factor"),
        )
    return theta, RopeScaling(
        kind,
        rope.number("factor"),
        original,
        beta_fast=rope.number("beta_fast", 32.0),
        beta_slow=rope.number("beta_slow", 1.0),
        attention_factor=rope.number("attention_factor", None),
        mscale=rope.number("mscale", None),
        mscale_all_dim=rope.number("mscale_all_dim", None),
        truncate=rope.get("truncate", bool, True),
    )
