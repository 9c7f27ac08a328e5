"""The Llama family: pre-norm decoder, grouped-query attention, rotary positions, gated MLP.

Llama 2, 3 and 3.x, SmolLM2, TinyLlama; Mistral without sliding window; Qwen2, which adds biases on q, k and v.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

from nexusengine.attention.base import AttentionBackend, AttentionMeta
from nexusengine.layers.ops import Map
from nexusengine.layers.rotary import RotaryEmbedding
from nexusengine.models.base import Model
from nexusengine.models.loader import WeightLoader


@dataclass(slots=True)
class Layer:
    """The weights of one layer.

    Attributes:
        qkv: q, k and v projections one below the other.
        gate_up: gate above up.
    """

    input_norm: torch.Tensor
    qkv: Map
    output: Map
    post_norm: torch.Tensor
    gate_up: Map
    down: Map


class LlamaForCausalLM(Model):
    """Loads and runs a model of this family."""

    def __init__(self, loader: WeightLoader, max_positions: int) -> None:
        c = self.config = loader.config
        self.ops = loader.ops
        self.embedding = loader.embedding()
        self.layers = [self._layer(loader, f"model.layers.{i}") for i in range(c.num_layers)]
        self.norm = loader.vector("model.norm.weight", c.hidden_size)
        self.head = loader.head(self.embedding)
        self.weights = loader.finish()
        self.rotary = RotaryEmbedding(c, max_positions, loader.dtype, loader.device)

    def _layer(self, loader: WeightLoader, name: str) -> Layer:
        c, attention, mlp = self.config, f"{name}.self_attn", f"{name}.mlp"
        q, kv = c.num_heads * c.head_dim, c.num_kv_heads * c.head_dim
        qkv = [(f"{attention}.q_proj", q), (f"{attention}.k_proj", kv), (f"{attention}.v_proj", kv)]
        output, down = [(f"{attention}.o_proj", c.hidden_size)], [(f"{mlp}.down_proj", c.hidden_size)]
        gate_up = [(f"{mlp}.gate_proj", c.intermediate_size), (f"{mlp}.up_proj", c.intermediate_size)]
        k_scale, v_scale = loader.kv_scales(attention)
        return Layer(
            input_norm=loader.vector(f"{name}.input_layernorm.weight", c.hidden_size),
            qkv=loader.linear(qkv, c.hidden_size, c.attention_bias, (k_scale, 1.0 / k_scale, 1.0 / v_scale)),
            output=loader.linear(output, q, c.attention_output_bias, input_factor=v_scale),
            post_norm=loader.vector(f"{name}.post_attention_layernorm.weight", c.hidden_size),
            gate_up=loader.linear(gate_up, c.hidden_size, c.mlp_bias, gated=True),
            down=loader.linear(down, c.intermediate_size, c.mlp_bias),
        )

    def forward(
        self,
        token_ids: torch.Tensor,
        positions: torch.Tensor,
        kv: torch.Tensor,
        attention: AttentionBackend,
        meta: AttentionMeta,
        wanted: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """As `Model.forward`; with rows wanted, the last layer computes no others."""
        c, ops = self.config, self.ops
        heads = (c.num_heads, c.num_kv_heads, c.head_dim)
        rope_table = ops.rope_table(self.rotary, positions)
        x = ops.embed(token_ids, self.embedding)
        mixed = ops.workspace("mixed", x, c.num_heads * c.head_dim)
        for i, layer in enumerate(self.layers):
            k_cache, v_cache = kv[0, i], kv[1, i]
            qkv = ops.linear(layer.qkv, x, norm=layer.input_norm)
            q = ops.rotate_and_store(qkv, rope_table, attention, k_cache, v_cache, meta, heads)
            attention.run(q, k_cache, v_cache, meta, mixed.view(q.shape))
            if wanted is not None and i == c.num_layers - 1:
                x, mixed = ops.gather("x", x, wanted), ops.gather("mixed", mixed, wanted)
            x = ops.add_linear(layer.output, mixed, into=x)
            x = ops.add_linear(layer.down, ops.gated(layer.gate_up, x, norm=layer.post_norm), into=x)
        return ops.norm(x, self.norm)

    def logits(self, hidden: torch.Tensor) -> torch.Tensor:
        return self.ops.logits(self.head, hidden)
