"""The Llama family: pre-norm decoder, grouped-query attention, rotary positions, gated MLP.

Llama 2, 3 and 3.x, SmolLM2, TinyLlama; Mistral without sliding window; Qwen2, which adds biases on q, k and v.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch

from nexusengine.attention.base import AttentionBackend, AttentionMeta
from nexusengine.errors import ModelLoadError
from nexusengine.layers.ops import Map, Ops, TorchOps
from nexusengine.layers.rotary import RotaryEmbedding
from nexusengine.loading.gguf_file import Q4Blocks
from nexusengine.loading.weights import WeightSource
from nexusengine.model_config import ModelConfig

_HARMLESS = (".rotary_emb.inv_freq",)


@dataclass(slots=True)
class Layer:
    """qkv: q, k and v projections one below the other; gate_up likewise."""

    input_norm: torch.Tensor
    qkv: Map
    output: Map
    post_norm: torch.Tensor
    gate_up: Map
    down: Map


class LlamaForCausalLM:
    """Weights on one device in one dtype. Not an nn.Module: nothing here is trained."""

    def __init__(
        self,
        config: ModelConfig,
        *,
        dtype: torch.dtype,
        device: torch.device,
        max_positions: int,
        source: WeightSource | None,
        seed: int = 0,
        ops: Ops[Any] | None = None,
        progress: Callable[[float], None] = lambda fraction: None,
    ) -> None:
        """source None: random weights from `seed`, for checks without a checkpoint. ops: what it computes with; by
        default torch. Raises ModelLoadError naming the tensor that is missing, surplus or of another shape."""
        self.config, self.dtype, self.device = config, dtype, device
        self._source = source
        self._generator = torch.Generator(device).manual_seed(seed)
        self._taken: set[str] = set()
        c = config
        self.ops: Ops[Any] = ops or TorchOps(c.rms_norm_eps)
        q, kv = c.num_heads * c.head_dim, c.num_kv_heads * c.head_dim
        self.embedding = self._linear([("model.embed_tokens", c.vocab_size)], c.hidden_size, False, head=True)
        self.layers = []
        for i in range(c.num_layers):
            name = f"model.layers.{i}"
            attention, mlp = f"{name}.self_attn", f"{name}.mlp"
            qkv = [(f"{attention}.q_proj", q), (f"{attention}.k_proj", kv), (f"{attention}.v_proj", kv)]
            gate_up = [(f"{mlp}.gate_proj", c.intermediate_size), (f"{mlp}.up_proj", c.intermediate_size)]
            self.layers.append(
                Layer(
                    input_norm=self._take(f"{name}.input_layernorm.weight", (c.hidden_size,)),
                    qkv=self._linear(qkv, c.hidden_size, c.attention_bias),
                    output=self._linear([(f"{attention}.o_proj", c.hidden_size)], q, c.attention_output_bias),
                    post_norm=self._take(f"{name}.post_attention_layernorm.weight", (c.hidden_size,)),
                    gate_up=self._linear(gate_up, c.hidden_size, c.mlp_bias, gated=True),
                    down=self._linear([(f"{mlp}.down_proj", c.hidden_size)], c.intermediate_size, c.mlp_bias),
                )
            )
            progress((i + 1) / c.num_layers)
        self.norm = self._take("model.norm.weight", (c.hidden_size,))
        if c.tie_embeddings:
            self.head = self.embedding
            self._taken.add("lm_head.weight")
        else:
            self.head = self._linear([("lm_head", c.vocab_size)], c.hidden_size, False, head=True)
        self._refuse_surplus()
        self._source = None
        self.rotary = RotaryEmbedding(config, max_positions, dtype, device)

    def forward(
        self,
        token_ids: torch.Tensor,
        positions: torch.Tensor,
        kv: torch.Tensor,
        attention: AttentionBackend,
        meta: AttentionMeta,
        wanted: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """token_ids, positions i8 `[T]`; kv `[2, L, num_blocks, block_size, H_kv, D]` -> normed hidden `[T, C]`.
        wanted i8 `[N]`: only these rows are needed, `[N, C]`; the last layer computes no others."""
        c, ops = self.config, self.ops
        heads = (c.num_heads, c.num_kv_heads, c.head_dim)
        angles = ops.angles(self.rotary, positions)
        x = ops.embed(token_ids, self.embedding)
        mixed = ops.memory("mixed", x, c.num_heads * c.head_dim)
        for i, layer in enumerate(self.layers):
            k_cache, v_cache = kv[0, i], kv[1, i]
            qkv = ops.linear(layer.qkv, x, norm=layer.input_norm)
            q = ops.rotate_and_store(qkv, angles, attention, k_cache, v_cache, meta, heads)
            attention.run(q, k_cache, v_cache, meta, mixed.view(q.shape))
            if wanted is not None and i == c.num_layers - 1:
                x, mixed = ops.take("x", x, wanted), ops.take("mixed", mixed, wanted)
            x = ops.add_linear(layer.output, mixed, into=x)
            x = ops.add_linear(layer.down, ops.gated(layer.gate_up, x, norm=layer.post_norm), into=x)
        return ops.norm(x, self.norm)

    def logits(self, hidden: torch.Tensor) -> torch.Tensor:
        """hidden `[N, C]` of the rows to sample -> float32 `[N, V]`."""
        return self.ops.logits(self.head, hidden)

    @property
    def weights_bytes(self) -> int:
        return sum(t.numel() * t.element_size() for t in self._tensors())

    def _tensors(self) -> Iterator[torch.Tensor]:
        yield self.norm
        yield from self.embedding.tensors()
        if self.head is not self.embedding:
            yield from self.head.tensors()
        for layer in self.layers:
            yield from (layer.input_norm, layer.post_norm)
            for linear in (layer.qkv, layer.output, layer.gate_up, layer.down):
                yield from linear.tensors()

    def _linear(self, parts: list[tuple[str, int]], inputs: int, bias: bool, **kind: bool) -> Map:
        """One linear map of several checkpoint tensors, one below the other."""
        weight = self._blocks(parts, inputs) or self._stack(
            [(f"{name}.weight", (rows, inputs)) for name, rows in parts]
        )
        biases = self._stack([(f"{name}.bias", (rows,)) for name, rows in parts]) if bias else None
        packed: Map = self.ops.pack(weight, biases, **kind)
        return packed

    def _blocks(self, parts: list[tuple[str, int]], inputs: int) -> Q4Blocks | None:
        """The parts in the 4-bit blocks they are stored in, if all are and the table of operations keeps such."""
        if not self.ops.keeps_blocks or self._source is None:
            return None
        found = []
        for name, rows in parts:
            self._check(f"{name}.weight", (rows, inputs))
            if (blocks := self._source.blocks(f"{name}.weight")) is None:
                return None
            found.append(blocks)
        return Q4Blocks.join(found)

    def _stack(self, parts: list[tuple[str, tuple[int, ...]]]) -> torch.Tensor:
        rows = sum(shape[0] for _, shape in parts)
        stacked = torch.empty(rows, *parts[0][1][1:], dtype=self.dtype, device=self.device)
        at = 0
        for name, shape in parts:
            stacked[at : at + shape[0]] = self._read(name, shape)
            at += shape[0]
        return stacked

    def _take(self, name: str, shape: tuple[int, ...]) -> torch.Tensor:
        return self._read(name, shape).to(self.device)

    def _read(self, name: str, shape: tuple[int, ...]) -> torch.Tensor:
        self._check(name, shape)
        if self._source is None:
            if name.endswith("norm.weight"):
                return torch.ones(shape, dtype=self.dtype)
            return torch.empty(shape, device=self.device).normal_(0.0, 0.02, generator=self._generator).to(self.dtype)
        return self._source.get(name, self.dtype)

    def _check(self, name: str, shape: tuple[int, ...]) -> None:
        self._taken.add(name)
        if self._source is None:
            return
        if name not in self._source.names():
            raise ModelLoadError(f"tensor {name} {list(shape)} is missing from the weights")
        found = self._source.shape(name)
        if found != shape:
            raise ModelLoadError(f"tensor {name} has the shape {list(found)}, the configuration asks for {list(shape)}")

    def _refuse_surplus(self) -> None:
        names = self._source.names() if self._source else frozenset()
        surplus = sorted(n for n in names - self._taken if not n.endswith(_HARMLESS))
        if surplus:
            more = f" and {len(surplus) - 1} more" if len(surplus) > 1 else ""
            raise ModelLoadError(f"the weights hold tensor {surplus[0]}{more}, which this architecture does not have")
