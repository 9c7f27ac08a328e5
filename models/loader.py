"""Brings a model's weights from a checkpoint to a device, whatever the family: `models/` files say only which.

Several tensors of a checkpoint that are used together become one linear map. Every tensor is checked against the shape
that the configuration asks for, and at the end none may be left over.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch

from nexusengine.errors import ModelLoadError
from nexusengine.layers.ops import Map, Ops, TorchOps
from nexusengine.loading.shown import one_line
from nexusengine.loading.weights import Stored, WeightSource
from nexusengine.model_config import ModelConfig

_EMBEDDING, _HEAD = "model.embed_tokens", "lm_head"
_HARMLESS = (".rotary_emb.inv_freq", ".k_scale", ".v_scale", ".q_scale", "_proj.output_scale")
"""Ends of the names of tensors that a family need not ask for."""


@dataclass(frozen=True, slots=True)
class LoadedWeights:
    """The weights that a `WeightLoader` has loaded.

    Attributes:
        total_bytes: on the device.
        unkept: linear maps that the file stores in a form which could not be kept, by name.
    """

    total_bytes: int
    unkept: list[str]


class WeightLoader:
    """Loads the weights of one model; `finish` once all are loaded.

    Args:
        config: the model's shape.
        source: the checkpoint; None: random weights from `seed`, for checks without one.
        dtype: of weights that are not kept as they are stored.
        ops: what the model computes with, and so the form of its linear maps; by default torch.
        scaled_kv: K and V are to lie in the cache divided by the scales that the checkpoint names for it.
        progress: called with the fraction that is loaded, 0..1.
    """

    def __init__(
        self,
        config: ModelConfig,
        source: WeightSource | None,
        *,
        dtype: torch.dtype,
        device: torch.device,
        seed: int = 0,
        ops: Ops[Any] | None = None,
        scaled_kv: bool = False,
        progress: Callable[[float], None] = lambda fraction: None,
    ) -> None:
        self.config, self.dtype, self.device = config, dtype, device
        self.ops: Ops[Any] = ops or TorchOps(config.rms_norm_eps)
        self._source, self._progress = source, progress
        self._scaled_kv = scaled_kv
        self._generator = torch.Generator(device).manual_seed(seed)
        self._names = source.names() if source else frozenset[str]()
        self._expected = len(self._names) or 9 * config.num_layers + 2
        self._loaded: set[str] = set()
        self._unkept: list[str] = []
        self._maps: list[Map] = []
        self._vectors: list[torch.Tensor] = []
        self._embedding_name, self._head_name = self._tied_names()

    def embedding(self) -> Map:
        """The map from token ids to hidden states, which may be the head as well."""
        return self.linear([(self._embedding_name, self.config.vocab_size)], self.config.hidden_size, head=True)

    def head(self, embedding: Map) -> Map:
        """The map from hidden states to logits: `embedding` itself where the two are tied."""
        if self._head_name == self._embedding_name:
            self._loaded |= {f"{_EMBEDDING}.weight", f"{_HEAD}.weight"}
            return embedding
        return self.linear([(self._head_name, self.config.vocab_size)], self.config.hidden_size, head=True)

    def vector(self, name: str, size: int) -> torch.Tensor:
        """A tensor `[size]`. A copy always: what was read may lie in a file's mapping."""
        vector = self._read(name, (size,)).to(self.device, copy=True)
        self._vectors.append(vector)
        return vector

    def linear(
        self,
        parts: list[tuple[str, int]],
        inputs: int,
        bias: bool = False,
        factors: tuple[float, ...] = (),
        input_factor: float = 1.0,
        **kind: bool,
    ) -> Map:
        """One linear map of several in the checkpoint, one below the other.

        Args:
            parts: (name without `.weight`, outputs) of each.
            inputs: columns of every part.
            bias: whether they have biases.
            factors: by which each part's outputs are multiplied.
            input_factor: by which its inputs are still to be multiplied.
            kind: `gated` or `head`, as `Ops.pack` takes them.
        """
        outer = factors or (1.0,) * len(parts)
        inner = tuple(factor * input_factor for factor in outer)
        weight: torch.Tensor | Stored | None = self._stored(parts, inputs, inner, kind.get("head", False))
        if weight is None:
            weight = self._stack([(f"{name}.weight", (rows, inputs)) for name, rows in parts], inner)
        biases = self._stack([(f"{name}.bias", (rows,)) for name, rows in parts], outer) if bias else None
        packed: Map = self.ops.pack(weight, biases, **kind)
        self._maps.append(packed)
        return packed

    def kv_scales(self, attention: str) -> tuple[float, float]:
        """Factors by which a layer's K and V are divided in the cache; 1 where the cache is not scaled.

        Rotation and attention are linear in K and V: q takes the factor that K loses, and what V loses is given back in
        the map of what attention comes to.

        Args:
            attention: name of the attention module, as `model.layers.0.self_attn`.
        """
        if not self._scaled_kv:
            return 1.0, 1.0
        return self._kv_scale(attention, "k"), self._kv_scale(attention, "v")

    def finish(self) -> LoadedWeights:
        """Prepare the maps for use, refuse what is left over in the checkpoint, and let go of its files.

        Raises:
            ModelLoadError: naming a tensor that the family has not asked for.
        """
        self.ops.finish()
        surplus = sorted(n for n in self._names - self._loaded if not n.endswith(_HARMLESS))
        if surplus:
            more = f" and {len(surplus) - 1} more" if len(surplus) > 1 else ""
            raise ModelLoadError(
                f"the weights hold tensor {one_line(surplus[0])}{more}, which this architecture does not have"
            )
        self._source, self._progress = None, lambda fraction: None
        tensors = [*self._vectors, *(tensor for one in self._maps for tensor in one.tensors())]
        self._vectors, self._maps = [], []
        return LoadedWeights(sum(t.numel() * t.element_size() for t in tensors), self._unkept)

    def _tied_names(self) -> tuple[str, str]:
        """The names of embedding and head; one name where they are one.

        As transformers 5 does: what the configuration ties is one all the same only where the checkpoint has one of
        them, or both and they are equal.
        """
        both = (_EMBEDDING, _HEAD)
        if not self.config.tie_embeddings:
            return both
        if f"{_HEAD}.weight" not in self._names:
            return _EMBEDDING, _EMBEDDING
        if f"{_EMBEDDING}.weight" not in self._names:
            return _HEAD, _HEAD
        if self._source is None or self._source.stored(f"{_HEAD}.weight") is not None:
            return both
        shape = (self.config.vocab_size, self.config.hidden_size)
        equal = torch.equal(*(self._read(f"{name}.weight", shape) for name in both))
        return (_EMBEDDING, _EMBEDDING) if equal else both

    def _kv_scale(self, attention: str, which: str) -> float:
        """The checkpoint's scale, up to the next power of two, by which weights lose nothing; 1 if it names none."""
        projection = f"{attention}.{which}_proj"
        for name in (f"{attention}.{which}_scale", f"{projection}.{which}_scale", f"{projection}.output_scale"):
            if self._source is not None and name in self._names:
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
            self._report()
        joined: Stored | None = found[0].join(found)
        if joined is None or not self.ops.takes(joined, head=head):
            self._unkept.extend(name for name, _ in parts)
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
            self._report()
        return stacked

    def _report(self) -> None:
        self._progress(min(len(self._loaded) / self._expected, 1.0))

    def _read(self, name: str, shape: tuple[int, ...]) -> torch.Tensor:
        self._check(name, shape)
        if self._source is None:
            if name.endswith("norm.weight"):
                return torch.ones(shape, dtype=self.dtype)
            return torch.empty(shape, device=self.device).normal_(0.0, 0.02, generator=self._generator).to(self.dtype)
        return self._source.get(name, self.dtype)

    def _check(self, name: str, shape: tuple[int, ...]) -> None:
        self._loaded.add(name)
        if self._source is None:
            return
        if name not in self._names:
            raise ModelLoadError(f"tensor {name} {list(shape)} is missing from the weights")
        found = self._source.shape(name)
        if found != shape:
            raise ModelLoadError(f"tensor {name} has the shape {list(found)}, the configuration asks for {list(shape)}")
