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
    index: dict[str, str] = {}
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
    return _stored(store, quantization, seed)


def packed(layout: str, seed: int = 0) -> tuple[Tensors, Tensors, dict[str, Any]]:
    """As `fp8`, of PACKED_LAYOUTS."""
    store, quantization = PACKED_LAYOUTS[layout]
    return _stored(store, quantization, seed)


def _stored(store: Any, quantization: dict[str, Any], seed: int) -> tuple[Tensors, Tensors, dict[str, Any]]:
    tensors = plain(seed)
    numbers = {name: tensor.float() for name, tensor in tensors.items()}
    for name in projections():
        stored, numbers[f"{name}.weight"] = store(tensors.pop(f"{name}.weight"))
        tensors |= {f"{name}.{what}": tensor for what, tensor in stored.items()}
    return tensors, numbers, quantization


def _groups(weight: torch.Tensor, group: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """(numbers 0 .. 15 `[in, out]`, scales float16 and zeros 1 .. 15 `[groups, out]`) of weight `[out, in]`."""
    parts = weight.float().t().reshape(-1, group, weight.shape[0])
    low, high = parts.amin(1).clamp_max(0), parts.amax(1).clamp_min(0)
    scales = ((high - low) / 15).clamp_min(1e-4).half()
    zeros = (-low / scales.float()).round().clamp(1, 15).int()
    spread = scales.float().repeat_interleave(group, 0)
    numbers = (weight.float().t() / spread).round().int() + zeros.repeat_interleave(group, 0)
    return numbers.clamp(0, 15), scales, zeros


def _along(numbers: torch.Tensor, dim: int, order: tuple[int, ...] = tuple(range(8))) -> torch.Tensor:
    """Eight numbers of 4 bits in each 32-bit integer along a dimension, the first lowest."""
    eights = numbers.long().unflatten(dim, (-1, 8)).movedim(dim + 1, -1)[..., list(order)]
    packed = (eights << torch.arange(0, 32, 4)).sum(-1)
    return torch.where(packed >= 2**31, packed - 2**32, packed).int()


AWQ_ORDER = (0, 2, 4, 6, 1, 3, 5, 7)


def by_gptq(weight: torch.Tensor) -> tuple[Tensors, torch.Tensor]:
    """4 bits in groups of 64 inputs, in an order of their own (desc_act); zeros are stored less 1."""
    inputs = weight.shape[1]
    order = torch.randperm(inputs, generator=torch.Generator().manual_seed(inputs))
    numbers, scales, zeros = _groups(weight[:, order], 64)
    g_idx, back = torch.empty(inputs, dtype=torch.int32), torch.empty_like(numbers)
    g_idx[order] = torch.arange(inputs, dtype=torch.int32) // 64
    back[order] = numbers
    plain = (back - zeros[g_idx.long()]).float() * scales[g_idx.long()].float()
    return {
        "qweight": _along(back, 0),
        "qzeros": _along(zeros - 1, 1),
        "scales": scales,
        "g_idx": g_idx,
    }, plain.t().contiguous()


def by_awq(weight: torch.Tensor) -> tuple[Tensors, torch.Tensor]:
    """4 bits in groups of 64 inputs, packed along the outputs in an order of its own."""
    numbers, scales, zeros = _groups(weight, 64)
    plain = (numbers - zeros.repeat_interleave(64, 0)).float() * scales.float().repeat_interleave(64, 0)
    return {
        "qweight": _along(numbers, 1, AWQ_ORDER),
        "qzeros": _along(zeros, 1, AWQ_ORDER),
        "scales": scales,
    }, plain.t().contiguous()


PACKED_LAYOUTS: dict[str, Any] = {
    "gptq": (
        by_gptq,
        {"quant_method": "gptq", "bits": 4, "group_size": 64, "desc_act": True, "sym": False, "lm_head": False},
    ),
    "awq": (
        by_awq,
        {"quant_method": "awq", "bits": 4, "group_size": 64, "version": "gemm", "zero_point": True},
    ),
}
