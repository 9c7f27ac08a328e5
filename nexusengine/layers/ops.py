"""What a model family computes besides attention: one table of operations, made once for a device.

`TorchOps` here works everywhere and is the reference; `native_ops.NativeOps` is the CPU kernels'. A model file names
operations and never asks which table it has.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any, Protocol, TypeVar

import torch
import torch.nn.functional as F

from nexusengine.attention.base import AttentionBackend, AttentionMeta
from nexusengine.layers.basic import Linear, rms_norm, silu_mul
from nexusengine.layers.packed import PackedMaps
from nexusengine.layers.rotary import RotaryEmbedding, rotate
from nexusengine.loading.packed import PackedWeight
from nexusengine.loading.weights import Stored


class Map(Protocol):
    """A linear map as a table keeps it: y = x W^T + b, W `[out, in]`."""

    def tensors(self) -> Iterator[torch.Tensor]:
        """Every tensor it holds, for counting memory."""
        ...


M = TypeVar("M", bound=Map)


class Ops(Protocol[M]):
    """Operations on rows that are tokens, x `[T, C]`.

    Results may lie in the table's own memory, where they hold until the same operation is called again: those of a step
    until the next one, so that what is to outlive it (logits among it) must be copied. `norm`, where it is an argument:
    RMS norm weights `[C]` that are applied to x first.
    """

    name: str
    keeps_stored: bool
    """Whether `pack` takes weights in some form in which files store them; `takes` says which."""
    cache_dtype: torch.dtype | None
    """In which K and V are kept where `rotate_and_store` writes them; None: in the model's."""

    def takes(self, weight: Stored, *, head: bool = False) -> bool:
        """True if `pack` keeps this weight as it is stored."""
        ...

    def pack(
        self,
        weight: torch.Tensor | Stored,
        bias: torch.Tensor | None = None,
        *,
        gated: bool = False,
        head: bool = False,
    ) -> M:
        """The map of a weight and a bias.

        Args:
            weight: `[out, in]`.
            bias: `[out]`.
            gated: it is gate above up, for `gated`.
            head: it is the embedding or the head, which suffer most from few bits.
        """
        ...

    def finish(self) -> None:
        """All maps of a model are packed."""
        ...

    def embed(self, ids: torch.Tensor, table: M) -> torch.Tensor:
        """Rows of `table` by token ids i8 `[T]`."""
        ...

    def norm(self, x: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
        """RMS norm."""
        ...

    def linear(self, to: M, x: torch.Tensor, norm: torch.Tensor | None = None) -> torch.Tensor: ...

    def add_linear(self, to: M, x: torch.Tensor, into: torch.Tensor) -> torch.Tensor:
        """`into` + the map of x; may overwrite `into`."""
        ...

    def gated(self, to: M, x: torch.Tensor, norm: torch.Tensor | None = None) -> torch.Tensor:
        """silu(gate) * up, where gate and up are the halves of the map of x."""
        ...

    def gather(self, use: str, x: torch.Tensor, rows: torch.Tensor) -> torch.Tensor:
        """Rows of x by number, i8 `[N]`, in a workspace of this use."""
        ...

    def logits(self, to: M, x: torch.Tensor) -> torch.Tensor:
        """float32 `[N, V]`."""
        ...

    def rope_table(self, rotary: RotaryEmbedding, positions: torch.Tensor) -> Any:
        """The form of the positions i8 `[T]` that `rotate_and_store` needs; once a step."""
        ...

    def workspace(self, use: str, like: torch.Tensor, columns: int) -> torch.Tensor:
        """Uninitialised `[T, columns]` for a use, with rows, type and device of `like`."""
        ...

    def step(self, compute: Callable[[], torch.Tensor], inputs: tuple[torch.Tensor, ...] | None) -> torch.Tensor:
        """Compute a step, or repeat what is remembered of one like it.

        Args:
            compute: operations of this table and of an attention backend that can be captured, on `inputs` and on what
                never moves. A table may remember them, and do just that for inputs of the same shapes at the same
                places.
            inputs: None: they are others every time.
        """
        ...

    def rotate_and_store(
        self,
        qkv: torch.Tensor,
        rope_table: Any,
        attention: AttentionBackend,
        k_cache: torch.Tensor,
        v_cache: torch.Tensor,
        meta: AttentionMeta,
        heads: tuple[int, int, int],
    ) -> torch.Tensor:
        """Rotate q and k, and write k and v into the cache.

        Args:
            qkv: `[T, (H + 2 H_kv) * D]`.
            rope_table: of the step.
            attention: the backend whose cache it is.
            k_cache: of the layer.
            v_cache: of the layer.
            meta: of the step.
            heads: H, H_kv, D.

        Returns:
            q `[T, H, D]`.
        """
        ...


class TorchOps:
    """Plain torch, on any device in any type.

    Args:
        eps: of RMS norms.
        packed: makes the maps of checkpoints that are packed, where one is.
    """

    name = "torch"
    keeps_stored = False
    cache_dtype: torch.dtype | None = None

    def __init__(self, eps: float, packed: PackedMaps | None = None) -> None:
        self._eps, self._packed = eps, packed
        self.keeps_stored = packed is not None

    def takes(self, weight: Stored, *, head: bool = False) -> bool:
        return self._packed is not None and isinstance(weight, PackedWeight)

    def pack(
        self,
        weight: torch.Tensor | Stored,
        bias: torch.Tensor | None = None,
        *,
        gated: bool = False,
        head: bool = False,
    ) -> Linear:
        if self._packed is not None and isinstance(weight, PackedWeight):
            return self._packed.make(weight, bias)
        if not isinstance(weight, torch.Tensor):
            raise TypeError(f"the table {self.name} keeps no {type(weight).__name__}")
        return Linear(weight, bias)

    def finish(self) -> None:
        if self._packed is not None:
            self._packed.finish()

    def embed(self, ids: torch.Tensor, table: Linear) -> torch.Tensor:
        return F.embedding(ids, table.weight)

    def norm(self, x: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
        return rms_norm(x, weight, self._eps)

    def linear(self, to: Linear, x: torch.Tensor, norm: torch.Tensor | None = None) -> torch.Tensor:
        return to(x if norm is None else self.norm(x, norm))

    def add_linear(self, to: Linear, x: torch.Tensor, into: torch.Tensor) -> torch.Tensor:
        return into + to(x)

    def gated(self, to: Linear, x: torch.Tensor, norm: torch.Tensor | None = None) -> torch.Tensor:
        return silu_mul(self.linear(to, x, norm))

    def gather(self, use: str, x: torch.Tensor, rows: torch.Tensor) -> torch.Tensor:
        return x[rows]

    def logits(self, to: Linear, x: torch.Tensor) -> torch.Tensor:
        return to(x).float()

    def rope_table(self, rotary: RotaryEmbedding, positions: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        return rotary.at(positions)

    def workspace(self, use: str, like: torch.Tensor, columns: int) -> torch.Tensor:
        return like.new_empty(len(like), columns)

    def step(self, compute: Callable[[], torch.Tensor], inputs: tuple[torch.Tensor, ...] | None) -> torch.Tensor:
        return compute()

    def rotate_and_store(
        self,
        qkv: torch.Tensor,
        rope_table: tuple[torch.Tensor, torch.Tensor],
        attention: AttentionBackend,
        k_cache: torch.Tensor,
        v_cache: torch.Tensor,
        meta: AttentionMeta,
        heads: tuple[int, int, int],
    ) -> torch.Tensor:
        count, kv_count, dim = heads
        q, k, v = torch.split(qkv, [count * dim, kv_count * dim, kv_count * dim], dim=-1)
        q = rotate(q.view(-1, count, dim), rope_table)
        k = rotate(k.view(-1, kv_count, dim), rope_table)
        attention.store(k, v.view(-1, kv_count, dim), k_cache, v_cache, meta)
        return q
