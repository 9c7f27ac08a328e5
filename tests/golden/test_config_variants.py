"""config.json in every variant that changes the result: logits as transformers computes them from the same files, or a
refusal that names the key. Nothing in between."""

from __future__ import annotations

import json
import random
from pathlib import Path
from typing import Any

import pytest
import torch

transformers = pytest.importorskip("transformers")

from nexusengine.errors import ConfigError, ModelLoadError  # noqa: E402
from tests.golden.test_logits import LLAMA3, SIZES, ours, prompts, save  # noqa: E402

YARN = {"rope_type": "yarn", "factor": 4.0}
SAME: dict[str, tuple[str, dict[str, Any]]] = {
    "plain": ("Llama", {}),
    "yarn, positions of the training at the top": (
        "Llama",
        {"rope_scaling": YARN, "original_max_position_embeddings": 64},
    ),
    "yarn, positions of the training in both places": (
        "Llama",
        {"rope_scaling": YARN | {"original_max_position_embeddings": 128}, "original_max_position_embeddings": 64},
    ),
    "llama3, positions of the training at the top": (
        "Llama",
        {"rope_scaling": LLAMA3, "original_max_position_embeddings": 32},
    ),
    "yarn without positions of the training": ("Llama", {"rope_scaling": YARN}),
    "yarn with a factor of its own": (
        "Llama",
        {"rope_scaling": YARN | {"attention_factor": 1.3, "original_max_position_embeddings": 64}},
    ),
    "yarn with betas": (
        "Llama",
        {"rope_scaling": YARN | {"beta_fast": 16, "beta_slow": 2, "original_max_position_embeddings": 64}},
    ),
    "yarn not truncated": (
        "Llama",
        {"rope_scaling": YARN | {"truncate": False, "original_max_position_embeddings": 100}},
    ),
    "yarn with mscale": (
        "Llama",
        {"rope_scaling": YARN | {"mscale": 0.7, "mscale_all_dim": 1.2, "original_max_position_embeddings": 64}},
    ),
    "yarn with one mscale": (
        "Llama",
        {"rope_scaling": YARN | {"mscale": 0.7, "mscale_all_dim": 0, "original_max_position_embeddings": 64}},
    ),
    "yarn with the factor from the lengths": (
        "Llama",
        {"rope_scaling": YARN | {"factor": None, "original_max_position_embeddings": 64}},
    ),
    "yarn as Qwen2.5 writes it": (
        "Qwen2",
        {
            "max_position_embeddings": 64,
            "rope_scaling": {"factor": 4.0, "original_max_position_embeddings": 64, "type": "yarn"},
        },
    ),
    "linear beyond the positions": (
        "Llama",
        {"max_position_embeddings": 64, "rope_scaling": {"type": "linear", "factor": 4}},
    ),
    "rope in both spellings": (
        "Llama",
        {"rope_scaling": {"type": "linear", "factor": 2.0}, "rope_parameters": {"rope_type": "linear", "factor": 8.0}},
    ),
    "two names of the kind": ("Llama", {"rope_scaling": {"type": "yarn", "rope_type": "linear", "factor": 2.0}}),
    "base in the parameters": (
        "Llama",
        {"rope_theta": 500.0, "rope_parameters": {"rope_type": "default", "rope_theta": 90_000.0}},
    ),
    "base in the scaling": (
        "Llama",
        {"rope_theta": 500.0, "rope_scaling": {"type": "linear", "factor": 2.0, "rope_theta": 9e4}},
    ),
    "a base that is whole": ("Llama", {"rope_theta": 500}),
    "dynamic within the positions": ("Llama", {"rope_scaling": {"type": "dynamic", "factor": 4.0}}),
    "a scaling that is empty": ("Llama", {"rope_scaling": {}}),
    "no base": ("Llama", {"rope_theta": ..., "rope_parameters": None}),
    "Llama with a window that it does not use": ("Llama", {"sliding_window": 16}),
    "Mistral with a window as long as the model": ("Mistral", {"sliding_window": 512}),
    "Mistral with a window longer than what is served": ("Mistral", {"sliding_window": 256}),
    "Mistral without a window": ("Mistral", {"sliding_window": None}),
    "Mistral that does not say": ("Mistral", {"sliding_window": ...}),
    "Mistral that says it has biases": ("Mistral", {"sliding_window": None, "attention_bias": True}),
    "Qwen2 with a window that it does not use": ("Qwen2", {"sliding_window": 16}),
    "Qwen2 with a window switched off": ("Qwen2", {"sliding_window": 16, "use_sliding_window": False}),
    "Qwen2 with a window for no layer": (
        "Qwen2",
        {"sliding_window": 16, "use_sliding_window": True, "max_window_layers": 3},
    ),
    "Qwen2 with layers that see all": (
        "Qwen2",
        {
            "sliding_window": 16,
            "use_sliding_window": True,
            "max_window_layers": 0,
            "layer_types": ["full_attention"] * 3,
        },
    ),
    "Qwen2 that says it has no biases": ("Qwen2", {"attention_bias": False}),
    "another epsilon": ("Llama", {"rms_norm_eps": 0.01}),
    "no epsilon": ("Llama", {"rms_norm_eps": ...}),
    "no activation": ("Llama", {"hidden_act": ...}),
    "pretraining_tp": ("Llama", {"pretraining_tp": 2}),
    "keys that change nothing": (
        "Llama",
        {"attention_dropout": 0.1, "attention_multiplier": 1.0, "logits_scaling": 1.0, "clip_qkv": None},
    ),
}
REFUSED: dict[str, tuple[str, dict[str, Any], str]] = {
    "Mistral's window": ("Mistral", {"sliding_window": 64}, "max_model_len 256 .* sliding window of 64"),
    "Qwen2's window": (
        "Qwen2",
        {"sliding_window": 64, "use_sliding_window": True, "max_window_layers": 1},
        "sliding window of 64",
    ),
    "Qwen2's window in one layer": (
        "Qwen2",
        {
            "sliding_window": 64,
            "use_sliding_window": True,
            "layer_types": ["full_attention", "sliding_attention", "full_attention"],
        },
        "sliding window of 64",
    ),
    "layers of another kind": ("Llama", {"layer_types": ["linear_attention"] * 3}, "linear_attention"),
    "longrope": ("Llama", {"rope_scaling": {"rope_type": "longrope", "factor": 4.0}}, "longrope"),
    "a base for each kind of layer": (
        "Qwen2",
        {"rope_parameters": {"full_attention": {"rope_type": "default", "rope_theta": 500.0}}},
        "'full_attention' is not supported",
    ),
    "several axes": ("Qwen2", {"rope_scaling": {"type": "default", "mrope_section": [1, 1, 2]}}, "mrope_section"),
    "a part of the head": ("Llama", {"partial_rotary_factor": 0.5}, "partial_rotary_factor is 0.5"),
    "a factor of 0": ("Llama", {"rope_scaling": {"type": "linear", "factor": 0}}, "factor is 0"),
    "a factor below 0": ("Llama", {"rope_scaling": {"type": "linear", "factor": -2.0}}, "factor is -2"),
    "a factor that is no number": (
        "Llama",
        {"rope_scaling": {"type": "yarn", "factor": float("nan")}},
        "factor is nan",
    ),
    "an endless factor": ("Llama", {"rope_scaling": {"type": "linear", "factor": float("inf")}}, "factor is inf"),
    "a base of 0": ("Llama", {"rope_theta": 0}, "rope_theta is 0"),
    "a base of 0 in the parameters": ("Llama", {"rope_parameters": {"rope_theta": 0.0}}, "rope_theta is 0"),
    "a base that is no number": ("Llama", {"rope_theta": float("nan")}, "rope_theta is nan"),
    "an attention factor of 0": (
        "Llama",
        {"rope_scaling": YARN | {"attention_factor": 0.0}},
        "attention_factor is 0",
    ),
    "factors that are the same": (
        "Llama",
        {"rope_scaling": LLAMA3 | {"low_freq_factor": 4.0}},
        "low_freq_factor and high_freq_factor",
    ),
    "a base of 1 with yarn": ("Llama", {"rope_theta": 1, "rope_scaling": YARN}, "base other than 1"),
    "a base that is next to nothing": ("Llama", {"rope_theta": 1e-300}, "rope_theta is 1e-300"),
    "a factor that is next to nothing": (
        "Llama",
        {"rope_scaling": {"type": "linear", "factor": 1e-40}},
        "factor of 1e-40 is out of range",
    ),
    "another activation": ("Llama", {"hidden_act": "gelu"}, "hidden_act is 'gelu'"),
    "transforms of activations": (
        "Llama",
        {
            "quantization_config": {
                "quant_method": "compressed-tensors",
                "config_groups": {"a": {"weights": {"type": "float", "num_bits": 8, "strategy": "channel"}}},
                "transform_config": {"config_groups": {"R1": {"type": "hadamard"}}},
            }
        },
        "transform_config asks for transforms of the activations",
    ),
    "another architecture before its sides": (
        "Llama",
        {
            "architectures": ["GemmaForCausalLM"],
            "hidden_act": "gelu",
            "rope_scaling": {"type": "longrope"},
            "quantization_config": {"quant_method": "bitsandbytes"},
            "sliding_window": "x",
        },
        "architecture 'GemmaForCausalLM' is not supported; known: Llama",
    ),
    **{
        key: ("Llama", {key: value}, f"{key} is .*not supported")
        for key, value in {
            "attention_multiplier": 0.5,
            "logits_scaling": 8.0,
            "logit_scale": 0.0625,
            "embedding_multiplier": 12.0,
            "residual_multiplier": 0.22,
            "lm_head_multiplier": 0.1,
            "ssm_multipliers": [1.0, 2.0],
            "final_logit_softcapping": 30.0,
            "attn_logit_softcapping": 50.0,
            "scale_emb": 12,
            "scale_depth": 1.4,
            "dim_model_base": 256,
            "clip_qkv": 8.0,
            "qk_layernorm": True,
            "use_qk_norm": True,
            "no_rope_layers": [1, 1, 0],
            "alibi": True,
            "rope_interleaved": True,
            "rotary_pct": 0.25,
            "query_pre_attn_scalar": 224,
            "attention_chunk_size": 64,
            "attn_temperature_tuning": True,
            "parallel_attn": True,
            "num_local_experts": 8,
            "kv_lora_rank": 512,
        }.items()
    },
}


def edited(folder: Path, architecture: str, change: dict[str, Any]) -> Path:
    """A model on disk whose config.json is then changed; `...` takes a key away."""
    extra: dict[str, Any] = {"sliding_window": None} if architecture == "Mistral" else {}
    save(folder, architecture=architecture, **extra)
    path = folder / "config.json"
    config = json.loads(path.read_text())
    config.pop("rope_parameters")
    config["rope_theta"] = SIZES["rope_theta"]
    config.pop("layer_types", None)
    config |= change
    path.write_text(json.dumps({key: value for key, value in config.items() if value is not ...}))
    return folder


def theirs(folder: Path) -> torch.Tensor:
    model = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    return torch.stack([model(torch.tensor([p])).logits[0, -1] for p in prompts()])


@pytest.mark.parametrize("variant", SAME)
def test_a_variant_gives_transformers_logits(tmp_path: Path, variant: str) -> None:
    folder = edited(tmp_path, *SAME[variant])
    with torch.inference_mode():
        expected, found = theirs(folder), ours(folder, prompts(), 50)
    assert expected.std() > 0.02, "the model says something"
    assert torch.equal(found.argmax(-1), expected.argmax(-1))
    assert (found - expected).abs().max() < 2e-5


@pytest.mark.parametrize("variant", REFUSED)
def test_a_variant_that_is_not_computed_is_refused_by_name(tmp_path: Path, variant: str) -> None:
    architecture, change, words = REFUSED[variant]
    folder = edited(tmp_path, architecture, change)
    with pytest.raises((ModelLoadError, ConfigError), match=words):
        ours(folder, prompts(), 50)


@pytest.mark.parametrize(
    ("there", "same"), [("both", False), ("both", True), ("lm_head", True), ("model.embed_tokens", True)]
)
def test_a_head_beside_tied_embeddings_is_taken_as_transformers_takes_it(
    tmp_path: Path, there: str, same: bool
) -> None:
    from safetensors.torch import load_file, save_file

    save(tmp_path, tie_word_embeddings=True)
    tensors = load_file(tmp_path / "model.safetensors")
    embedding = tensors["model.embed_tokens.weight"]
    tensors["lm_head.weight"] = embedding.clone() if same else torch.randn_like(embedding) * 0.02
    if there != "both":
        del tensors["lm_head.weight" if there == "model.embed_tokens" else "model.embed_tokens.weight"]
    save_file(tensors, tmp_path / "model.safetensors", {"format": "pt"})
    with torch.inference_mode():
        expected, found = theirs(tmp_path), ours(tmp_path, prompts(), 50)
    assert (found - expected).abs().max() < 2e-5


def test_forty_random_mixtures_of_keys_give_transformers_logits(tmp_path: Path) -> None:
    rng, compared = random.Random(7), 0
    for i in range(40):
        architecture = rng.choice(["Llama", "Mistral", "Qwen2"])
        kind = rng.choice(["none", "linear", "yarn", "llama3", "dynamic"])
        rope: dict[str, Any] | None = None if kind == "none" else {"factor": rng.choice([1.0, 1.5, 4, 8.0])}
        if rope is not None:
            rope[rng.choice(["type", "rope_type"])] = kind
            if kind == "llama3":
                rope |= {"low_freq_factor": 1.0, "high_freq_factor": rng.choice([2.0, 4])}
            if kind in ("llama3", "yarn") and rng.random() < 0.7:
                rope["original_max_position_embeddings"] = rng.choice([32, 64, 512])
        change: dict[str, Any] = {
            rng.choice(["rope_scaling", "rope_parameters"]): rope,
            "rope_theta": rng.choice([100.0, 10_000, 1e6]),
            "rms_norm_eps": rng.choice([1e-6, 1e-3]),
            "max_position_embeddings": rng.choice([256, 512]),
        }
        if rng.random() < 0.3:
            change["original_max_position_embeddings"] = rng.choice([32, 128])
        if architecture != "Llama":
            change["sliding_window"] = rng.choice([None, 16, 256, 512])
        if architecture == "Qwen2":
            change |= {"use_sliding_window": rng.random() < 0.5, "max_window_layers": rng.choice([0, 1, 3, 28])}
        folder = edited(tmp_path / str(i), architecture, change)
        try:
            with torch.inference_mode():
                found = ours(folder, prompts(), 50)
        except ConfigError as error:
            assert "sliding window of 16" in error.message, (change, error)  # noqa: PT017
            continue
        with torch.inference_mode():
            assert (found - theirs(folder)).abs().max() < 2e-5, (architecture, change)
        compared += 1
    assert compared > 25
