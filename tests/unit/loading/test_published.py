"""Configurations as published models have them, with the keys that change nothing: they are read as they are meant."""

from __future__ import annotations

from typing import Any

import pytest

from nexusengine.errors import ModelLoadError
from nexusengine.loading.config_json import parse_config

COMMON: dict[str, Any] = {
    "_name_or_path": "x", "attention_dropout": 0.0, "bos_token_id": 1, "eos_token_id": 2, "hidden_act": "silu",
    "initializer_range": 0.02, "rms_norm_eps": 1e-05, "torch_dtype": "bfloat16", "transformers_version": "4.43.1",
    "use_cache": True, "pretraining_tp": 1, "tie_word_embeddings": False,
}  # fmt: skip
LLAMA3 = {
    "factor": 8.0, "high_freq_factor": 4.0, "low_freq_factor": 1.0, "original_max_position_embeddings": 8192,
    "rope_type": "llama3",
}  # fmt: skip


def sizes(
    hidden: int, wide: int, layers: int, heads: int, kv: int | None, vocabulary: int, positions: int
) -> dict[str, Any]:
    found = {
        "hidden_size": hidden, "intermediate_size": wide, "num_hidden_layers": layers, "num_attention_heads": heads,
        "num_key_value_heads": kv, "vocab_size": vocabulary, "max_position_embeddings": positions,
    }  # fmt: skip
    return {key: value for key, value in found.items() if value is not None}


PUBLISHED: dict[str, tuple[str, dict[str, Any], int]] = {
    "Llama-2-7b": ("Llama", sizes(4096, 11008, 32, 32, 32, 32000, 4096) | {"rope_scaling": None}, 4096),
    "Llama-3.1-8B-Instruct": (
        "Llama",
        sizes(4096, 14336, 32, 32, 8, 128256, 131072)
        | {"attention_bias": False, "mlp_bias": False, "eos_token_id": [128001, 128008, 128009]}
        | {"rope_theta": 500000.0, "rope_scaling": LLAMA3},
        131072,
    ),
    "Llama-3.2-1B": (
        "Llama",
        sizes(2048, 8192, 16, 32, 8, 128256, 131072)
        | {"head_dim": 64, "tie_word_embeddings": True, "rope_theta": 500000.0}
        | {"rope_scaling": LLAMA3 | {"factor": 32.0}},
        131072,
    ),
    "SmolLM2-135M-Instruct": (
        "Llama",
        sizes(576, 1536, 30, 9, 3, 49152, 8192)
        | {"is_llama_config": True, "rope_interleaved": False, "rope_theta": 100000, "tie_word_embeddings": True}
        | {"pad_token_id": 2, "transformers.js_config": {"kv_cache_dtype": {"q4f16": "float16"}}},
        8192,
    ),
    "TinyLlama-1.1B": ("Llama", sizes(2048, 5632, 22, 32, 4, 32000, 2048) | {"rope_scaling": None}, 2048),
    "Yi-6B": ("Llama", sizes(4096, 11008, 32, 32, 4, 64000, 4096) | {"rope_theta": 5000000.0}, 4096),
    "deepseek-coder-6.7b": (
        "Llama",
        sizes(4096, 11008, 32, 32, 32, 32256, 16384)
        | {"rope_theta": 100000, "rope_scaling": {"factor": 4.0, "type": "linear"}},
        65536,
    ),
    "DeepSeek-R1-Distill-Qwen-7B": (
        "Qwen2",
        sizes(3584, 18944, 28, 28, 4, 152064, 131072)
        | {"max_window_layers": 28, "rope_theta": 10000, "sliding_window": 4096, "use_mrope": False}
        | {"use_sliding_window": False},
        131072,
    ),
    "Qwen2.5-0.5B-Instruct": (
        "Qwen2",
        sizes(896, 4864, 24, 14, 2, 151936, 32768)
        | {"max_window_layers": 21, "rope_theta": 1000000.0, "sliding_window": 32768, "tie_word_embeddings": True}
        | {"use_sliding_window": False},
        32768,
    ),
    "Qwen2.5-7B-Instruct as its page says for long texts": (
        "Qwen2",
        sizes(3584, 18944, 28, 28, 4, 152064, 32768)
        | {"max_window_layers": 28, "sliding_window": 131072, "use_sliding_window": False}
        | {"rope_scaling": {"factor": 4.0, "original_max_position_embeddings": 32768, "type": "yarn"}},
        131072,
    ),
    "Mistral-7B-Instruct-v0.3": (
        "Mistral",
        sizes(4096, 14336, 32, 32, 8, 32768, 32768) | {"rope_theta": 1000000.0, "sliding_window": None},
        32768,
    ),
    "Mistral-7B-v0.1": (
        "Mistral",
        sizes(4096, 14336, 32, 32, 8, 32000, 32768) | {"rope_theta": 10000.0, "sliding_window": 4096},
        4096,
    ),
    "Mistral-Nemo": (
        "Mistral",
        sizes(5120, 14336, 40, 32, 8, 131072, 1024000) | {"head_dim": 128, "sliding_window": None},
        1024000,
    ),
    "as transformers 5 writes it": (
        "Qwen2",
        sizes(896, 4864, 2, 14, 2, 151936, 32768)
        | {"dtype": "bfloat16", "layer_types": ["full_attention"] * 2, "sliding_window": None}
        | {"rope_parameters": {"rope_theta": 1000000.0, "rope_type": "default"}, "use_sliding_window": False}
        | {"max_window_layers": 28, "model_type": "qwen2", "pad_token_id": None},
        32768,
    ),
}


@pytest.mark.parametrize("name", PUBLISHED)
def test_a_published_configuration_is_read(name: str) -> None:
    architecture, values, longest = PUBLISHED[name]
    config = parse_config(COMMON | values | {"architectures": [f"{architecture}ForCausalLM"]}, "config.json")
    assert config.longest == longest
    assert config.head_dim == values.get("head_dim", values["hidden_size"] // values["num_attention_heads"])


@pytest.mark.parametrize(
    "name",
    [
        "MixtralForCausalLM", "Qwen2MoeForCausalLM", "Qwen3ForCausalLM", "Gemma2ForCausalLM", "Phi3ForCausalLM",
        "GraniteForCausalLM", "CohereForCausalLM", "DeepseekV3ForCausalLM", "LlamaForSequenceClassification",
        "Llama4ForConditionalGeneration", "Ministral3ForCausalLM", "GPT2LMHeadModel",
    ],
)  # fmt: skip
def test_another_architecture_is_refused_for_that_reason(name: str) -> None:
    values = COMMON | {"architectures": [name], "hidden_act": "gelu_pytorch_tanh", "num_experts": 8, "n_embd": 768}
    with pytest.raises(ModelLoadError, match=f"architecture '{name}' is not supported; known: Llama"):
        parse_config(values, "config.json")
