"""Tiny checkpoints as they are published: config.json and safetensors files, and their weights in plain numbers."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file

CONFIG: dict[str, Any] = {
    "architectures": ["LlamaForCausalLM"],
    "hidden_size": 256,
    "intermediate_size": 384,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 64,
    "vocab_size": 89,
    "max_position_embeddings": 128,
    "rms_norm_eps": 1e-5,
    "rope_theta": 10000.0,
    "eos_token_id": 2,
    "torch_dtype": "bfloat16",
}
PROJECTIONS = {
    "self_attn.q_proj": (256, 256),
    "self_attn.k_proj": (128, 256),
    "self_attn.v_proj": (128, 256),
    "self_attn.o_proj": (256, 256),
    "mlp.gate_proj": (384, 256),
    "mlp.up_proj": (384, 256),
    "mlp.down_proj": (256, 384),
}
Tensors = dict[str, torch.Tensor]


def plain(seed: int = 0) -> Tensors:
    """CONFIG's model in bfloat16."""
    torch.manual_seed(seed)
    found = {"model.norm.weight": torch.rand(256) + 0.5}
    found |= {f"{name}.weight": torch.randn(89, 256) / 8 for name in ("model.embed_tokens", "lm_head")}
    for i in range(2):
        found |= {f"model.layers.{i}.{n}.weight": torch.randn(s) / 12 for n, s in PROJECTIONS.items()}
        for norm in ("input_layernorm", "post_attention_layernorm"):
            found[f"model.layers.{i}.{norm}.weight"] = torch.rand(256) + 0.5
    return {name: tensor.bfloat16() for name, tensor in found.items()}


def projections() -> list[str]:
    """Names of the linear maps that checkpoints quantise."""
    return [f"model.layers.{i}.{name}" for i in range(2) for name in PROJECTIONS]


def write(folder: Path, tensors: Tensors, quantization: dict[str, Any] | None = None, files: int = 1) -> Path:
    """The folder; with several files, tensors in the order of the layers and an index."""
    config = CONFIG if quantization is None else CONFIG | {"quantization_config": quantization}
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "config.json").write_text(json.dumps(config))
    names = sorted(tensors, key=lambda n: (n.startswith(("model.norm", "lm_head")), "embed" not in n, n))
    size = -(-len(names) // files)
    index = {}
    for i in range(files):
        part = names[i * size : (i + 1) * size]
        name = "model.safetensors" if files == 1 else f"model-{i + 1:05}-of-{files:05}.safetensors"
        save_file({n: tensors[n].contiguous() for n in part}, folder / name)
        index |= dict.fromkeys(part, name)
    if files > 1:
        (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": index}))
    return folder


def _rounded(weight: torch.Tensor, scale: torch.Tensor, spread: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """(8-bit floats, what they stand for in float32)."""
    data = (weight.float() / spread).clamp(-448, 448).to(torch.float8_e4m3fn)
    return data, data.float() * spread


def by_channel(weight: torch.Tensor) -> tuple[Tensors, torch.Tensor]:
    """As llm-compressor's FP8-dynamic: scale bfloat16 `[out, 1]`."""
    scale = (weight.float().abs().amax(1, keepdim=True) / 448).bfloat16()
    data, numbers = _rounded(weight, scale, scale.float())
    return {"weight": data, "weight_scale": scale}, numbers


def by_tensor(weight: torch.Tensor) -> tuple[Tensors, torch.Tensor]:
    """As llm-compressor's FP8: one scale `[1]`, and one that was measured for the input."""
    scale = (weight.float().abs().max() / 448).bfloat16().reshape(1)
    data, numbers = _rounded(weight, scale, scale.float())
    return {"weight": data, "weight_scale": scale, "input_scale": torch.full((1,), 0.02)}, numbers


def by_number(weight: torch.Tensor) -> tuple[Tensors, torch.Tensor]:
    """As AutoFP8: scales without a dimension."""
    found, numbers = by_tensor(weight)
    return {name: t if name == "weight" else t.float().reshape(()) for name, t in found.items()}, numbers


def by_block(weight: torch.Tensor, name: str = "weight_scale_inv") -> tuple[Tensors, torch.Tensor]:
    """As Qwen3-FP8: scale bfloat16 for each 128 x 128."""
    n, k = weight.shape
    blocks = weight.float().view(n // 128, 128, k // 128, 128).abs().amax((1, 3)) / 448
    scale = blocks.bfloat16()
    spread = scale.float().repeat_interleave(128, 0).repeat_interleave(128, 1)
    data, numbers = _rounded(weight, scale, spread)
    return {"weight": data, name: scale}, numbers


def compressed(strategy: str, **more: Any) -> dict[str, Any]:
    """quantization_config as llm-compressor writes it."""
    activations = {"dynamic": True, "num_bits": 8, "strategy": "token", "symmetric": True, "type": "float"}
    weights = {"dynamic": False, "num_bits": 8, "strategy": strategy, "symmetric": True, "type": "float", **more}
    group = {"input_activations": activations, "output_activations": None, "targets": ["Linear"], "weights": weights}
    return {
        "config_groups": {"group_0": group},
        "format": "float-quantized",
        "ignore": ["lm_head"],
        "kv_cache_scheme": None,
        "quant_method": "compressed-tensors",
        "quantization_status": "compressed",
    }


QWEN3 = {"activation_scheme": "dynamic", "fmt": "e4m3", "quant_method": "fp8", "weight_block_size": [128, 128]}
FP8_LAYOUTS: dict[str, Any] = {
    "compressed-tensors by channel": (by_channel, compressed("channel")),
    "compressed-tensors by tensor": (by_tensor, compressed("tensor")),
    "compressed-tensors by block": (
        lambda w: by_block(w, "weight_scale"),
        compressed("block", block_structure=[128, 128]),
    ),
    "fp8 by tensor": (by_number, {"activation_scheme": "static", "quant_method": "fp8"}),
    "fp8 by block": (by_block, QWEN3),
    "fbgemm_fp8": (by_channel, {"activation_scale_ub": 1200.0, "quant_method": "fbgemm_fp8"}),
}
"""By name: what stores a weight so, and the quantization_config that says so."""


def fp8(layout: str, seed: int = 0) -> tuple[Tensors, Tensors, dict[str, Any]]:
    """(the tensors of the files, the same in plain float32, quantization_config)."""
    store, quantization = FP8_LAYOUTS[layout]
    tensors = plain(seed)
    numbers = {name: tensor.float() for name, tensor in tensors.items()}
    for name in projections():
        stored, numbers[f"{name}.weight"] = store(tensors.pop(f"{name}.weight"))
        tensors |= {f"{name}.{what}": tensor for what, tensor in stored.items()}
    return tensors, numbers, quantization
