"""The Llama family: pre-norm decoder, grouped-query attention, rotary positions, gated MLP.

Llama 2, 3 and 3.x, SmolLM2, TinyLlama; Mistral without sliding window; Qwen2, which adds biases on q, k and v.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch

from nexusengine.attention.base import AttentionBackend, AttentionMeta
from nexusengine.errors import ModelLoadError
from nexusengine.layers.ops import Map, Ops, TorchOps
from nexusengine.layers.rotary import RotaryEmbedding
from nexusengine.loading.shown import one_line
from nexusengine.loading.weights import Stored, WeightSource
from nexusengine.model_config import ModelConfig

_HARMLESS = (".rotary_emb.inv_freq", ".k_scale", ".v_scale", ".q_scale", "_proj.output_scale")


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
        scaled_kv: bool = False,
        progress: Callable[[float], None] = lambda fraction: None,
    ) -> None:
        """source None: random weights from `seed`, for checks without a checkpoint. ops: what it computes with; by
        default torch. scaled_kv: K and V are to lie in the cache divided by the scales that the checkpoint names for
        it. unkept: maps that the file stores in a form which could not be kept.

        Raises ModelLoadError naming the tensor that is missing, surplus or of another shape.
        """
        self.config, self.dtype, self.device = config, dtype, device
        self._source = source
        self._generator = torch.Generator(device).manual_seed(seed)
        self._taken: set[str] = set()
        self._progress = progress
        self._tensors_expected = len(source.names()) if source else 9 * config.num_layers + 2
        self.unkept: list[str] = []
        c = config
        self.ops: Ops[Any] = ops or TorchOps(c.rms_norm_eps)
        q, kv = c.num_heads * c.head_dim, c.num_kv_heads * c.head_dim
        embedding, head = self._embedding_and_head()
        self.embedding = self._linear([(embedding, c.vocab_size)], c.hidden_size, False, head=True)
        self.layers = []
        for i in range(c.num_layers):
            name = f"model.layers.{i}"
            attention, mlp = f"{name}.self_attn", f"{name}.mlp"
            qkv = [(f"{attention}.q_proj", q), (f"{attention}.k_proj", kv), (f"{attention}.v_proj", kv)]
            k_scale, v_scale = (self._kv_scale(attention, which) if scaled_kv else 1.0 for which in "kv")
            factors = (k_scale, 1.0 / k_scale, 1.0 / v_scale)
            gate_up = [(f"{mlp}.gate_proj", c.intermediate_size), (f"{mlp}.up_proj", c.intermediate_size)]
            self.layers.append(
                Layer(
                    input_norm=self._take(f"{name}.input_layernorm.weight", (c.hidden_size,)),
                    qkv=self._linear(qkv, c.hidden_size, c.attention_bias, factors),
                    output=self._linear(
                        [(f"{attention}.o_proj", c.hidden_size)], q, c.attention_output_bias, input_factor=v_scale
                    ),
                    post_norm=self._take(f"{name}.post_attention_layernorm.weight", (c.hidden_size,)),
                    gate_up=self._linear(gate_up, c.hidden_size, c.mlp_bias, gated=True),
                    down=self._linear([(f"{mlp}.down_proj", c.hidden_size)], c.intermediate_size, c.mlp_bias),
                )
            )
        self.norm = self._take("model.norm.weight", (c.hidden_size,))
        if head == embedding:
            self.head = self.embedding
            self._taken |= {"model.embed_tokens.weight", "lm_head.weight"}
        else:
            self.head = self._linear([(head, c.vocab_size)], c.hidden_size, False, head=True)
        self.ops.finish()
        self._refuse_surplus()
        self._source, self._progress = None, lambda fraction: None  # neither keeps the files mapped
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
        """hidden `[N, C]` of the rows to sample -> float32 `[N, V]`, which holds until the next call (see Ops)."""
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

    def _embedding_and_head(self) -> tuple[str, str]:
        """The names of both maps; one name where they are one. As transformers 5 does: what the configuration ties is
        one all the same only where the checkpoint has one of them, or both and they are equal."""
        both = ("model.embed_tokens", "lm_head")
        if not self.config.tie_embeddings:
            return both
        there = self._source.names() if self._source else frozenset()
        if "lm_head.weight" not in there:
            return both[0], both[0]
        if "model.embed_tokens.weight" not in there:
            return both[1], both[1]
        if self._source is None or self._source.stored("lm_head.weight") is not None:
            return both
        shape = (self.config.vocab_size, self.config.hidden_size)
        equal = torch.equal(*(self._read(f"{name}.weight", shape) for name in both))
        return (both[0], both[0]) if equal else both

    def _linear(
        self,
        parts: list[tuple[str, int]],
        inputs: int,
        bias: bool,
        factors: tuple[float, ...] = (),
        input_factor: float = 1.0,
        **kind: bool,
    ) -> Map:
        """One linear map of several checkpoint tensors, one below the other. factors: by which each part's outputs are
        multiplied. input_factor: by which its inputs are still to be multiplied."""
        outer = factors or (1.0,) * len(parts)
        inner = tuple(factor * input_factor for factor in outer)
        weight: torch.Tensor | Stored | None = self._stored(parts, inputs, inner, kind.get("head", False))
        if weight is None:
            weight = self._stack([(f"{name}.weight", (rows, inputs)) for name, rows in parts], inner)
        biases = self._stack([(f"{name}.bias", (rows,)) for name, rows in parts], outer) if bias else None
        packed: Map = self.ops.pack(weight, biases, **kind)
        return packed

    def _kv_scale(self, attention: str, which: str) -> float:
        """By what a layer's K or V is divided in the cache: the checkpoint's scale, up to the next power of two, so
        that the weights it is multiplied into lose nothing; 1 if it names none.

        Rotation and attention are linear in K and V: q takes the factor that K loses, and what V loses is given back in
        the map of what attention comes to.
        """
        projection = f"{attention}.{which}_proj"
        for name in (f"{attention}.{which}_scale", f"{projection}.{which}_scale", f"{projection}.output_scale"):
            if self._source is not None and name in self._source.names():
                scale = float(self._source.get(name, torch.float32).max())
                if not 0.0 < scale < math.inf:
                    raise ModelLoadError(f"tensor {name} is {scale}, which is no scale")
                return float(2.0 ** math.ceil(math.log2(scale)))
        return 1.0

    def _stored(
        self, parts: list[tuple[str, int]], inputs: int, factors: tuple[float, ...], head: bool
    ) -> Stored | None:
        """The parts in the form they are stored in, if all have one that the table of operations keeps."""
        if not self.ops.keeps_stored or self._source is None:
            return None
        found = []
        for (name, rows), factor in zip(parts, factors, strict=True):
            self._check(f"{name}.weight", (rows, inputs))
            stored = self._source.stored(f"{name}.weight")
            if stored is None:
                return None
            found.append(stored.to(self.device) if factor == 1.0 else stored.to(self.device).scaled(factor))
            self._tell()
        joined: Stored | None = found[0].join(found)
        if joined is None or not self.ops.takes(joined, head=head):
            self.unkept.extend(name for name, _ in parts)
            return None
        return joined

    def _stack(self, parts: list[tuple[str, tuple[int, ...]]], factors: tuple[float, ...]) -> torch.Tensor:
        for name, shape in parts:
            self._check(name, shape)
        rows = sum(shape[0] for _, shape in parts)
        stacked = torch.empty(rows, *parts[0][1][1:], dtype=self.dtype, device=self.device)
        at = 0
        for (name, shape), factor in zip(parts, factors, strict=True):
            stacked[at : at + shape[0]] = self._read(name, shape)
            if factor != 1.0:
                stacked[at : at + shape[0]] *= factor
            at += shape[0]
            self._tell()
        return stacked

    def _tell(self) -> None:
        self._progress(min(len(self._taken) / self._tensors_expected, 1.0))

    def _take(self, name: str, shape: tuple[int, ...]) -> torch.Tensor:
        """A copy always: what was read may lie in a file's mapping."""
        return self._read(name, shape).to(self.device, copy=True)

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
            raise ModelLoadError(
                f"the weights hold tensor {one_line(surplus[0])}{more}, which this architecture does not have"
            )
