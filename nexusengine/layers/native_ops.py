"""The table of operations on the CPU kernels (nexusengine.native): float32 activations, packed weights.

Norms, residual additions and the gated activation are part of the linear maps, and rotation is part of the KV store, so
that a layer is six calls.
"""

from __future__ import annotations

import ctypes
from collections.abc import Iterator

import torch

from nexusengine.attention.base import AttentionBackend, AttentionMeta
from nexusengine.config import Quantization
from nexusengine.layers.ops import TorchOps
from nexusengine.loading.gguf_file import Q4Blocks
from nexusengine.native import Library, structs
from nexusengine.native.cache import cache_of
from nexusengine.native.pack import PackedWeight, pack_float, pack_int8, pack_q4, q4_blocks


class PackedMap:
    """A packed weight and the arguments of its call, filled in once."""

    def __init__(self, packed: PackedWeight, gated: bool) -> None:
        self.packed = packed
        self.outputs = packed.n // 2 if gated else packed.n
        self.weight = packed.struct()
        self.weight_reference = ctypes.byref(self.weight)
        self.call = structs.Linear(weight=ctypes.pointer(self.weight))
        self.reference = ctypes.byref(self.call)

    def tensors(self) -> Iterator[torch.Tensor]:
        yield from self.packed.tensors()


class NativeOps:
    """One thread calls it. Results of `linear` and `gated` lie in memory that is used again for the next layer."""

    def __init__(self, eps: float, library: Library, quantization: Quantization = "none") -> None:
        self.name = f"native ({library.isa})"
        self.keeps_blocks = quantization == "int4"
        self._quantization = quantization
        self._eps, self._library = eps, library
        self._torch = TorchOps(eps)
        self._rows: dict[tuple[str, int], torch.Tensor] = {}
        self._store = structs.RotateStore()
        self._store_reference = ctypes.byref(self._store)

    def pack(
        self,
        weight: torch.Tensor | Q4Blocks,
        bias: torch.Tensor | None = None,
        *,
        gated: bool = False,
        head: bool = False,
    ) -> PackedMap:
        """int4: 4-bit blocks are kept, other weights rounded to such; the head, and what is no multiple of 32 wide, has
        8 bits."""
        if isinstance(weight, Q4Blocks):
            return PackedMap(pack_q4(weight, bias, gated), gated)
        if self._quantization == "none":
            return PackedMap(pack_float(weight, bias, gated), gated)
        if self._quantization == "bf16":
            return PackedMap(pack_float(weight.bfloat16(), bias, gated), gated)
        if self._quantization == "int8" or head or weight.shape[1] % 32:
            return PackedMap(pack_int8(weight, bias, gated), gated)
        return PackedMap(pack_q4(q4_blocks(weight), bias, gated), gated)

    def embed(self, ids: torch.Tensor, table: PackedMap) -> torch.Tensor:
        out = torch.empty(len(ids), table.packed.k)
        self._library.embed(table.weight_reference, ids.data_ptr(), len(ids), out.data_ptr())
        return out

    def norm(self, x: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
        out = torch.empty_like(x)
        self._library.rms_norm(x.data_ptr(), weight.data_ptr(), self._eps, len(x), x.shape[1], out.data_ptr())
        return out

    def linear(self, to: PackedMap, x: torch.Tensor, norm: torch.Tensor | None = None) -> torch.Tensor:
        out = self._memory("linear", len(x), to.outputs)
        self._run(to, x, norm, out, structs.STORE)
        return out

    def add_linear(self, to: PackedMap, x: torch.Tensor, into: torch.Tensor) -> torch.Tensor:
        self._run(to, x, None, into, structs.ADD)
        return into

    def gated(self, to: PackedMap, x: torch.Tensor, norm: torch.Tensor | None = None) -> torch.Tensor:
        out = self._memory("gated", len(x), to.outputs)
        self._run(to, x, norm, out, structs.GATED)
        return out

    def logits(self, to: PackedMap, x: torch.Tensor) -> torch.Tensor:
        out = torch.empty(len(x), to.outputs)
        self._run(to, x, None, out, structs.STORE)
        return out

    def rotate_and_store(
        self,
        qkv: torch.Tensor,
        cos_sin: tuple[torch.Tensor, torch.Tensor],
        attention: AttentionBackend,
        k_cache: torch.Tensor,
        v_cache: torch.Tensor,
        meta: AttentionMeta,
        heads: tuple[int, int, int],
    ) -> torch.Tensor:
        if attention.name != "cpu":  # another backend may keep K and V in a way of its own
            return self._torch.rotate_and_store(qkv, cos_sin, attention, k_cache, v_cache, meta, heads)
        count, kv_count, dim = heads
        s = self._store
        s.qkv, s.cos, s.sin = qkv.data_ptr(), cos_sin[0].data_ptr(), cos_sin[1].data_ptr()
        s.slots = meta.slot_mapping.data_ptr()
        s.tokens, s.heads, s.kv_heads, s.dim = len(qkv), count, kv_count, dim
        s.cache = cache_of(k_cache, v_cache, dim)
        self._library.rotate_store(self._store_reference)
        return qkv[:, : count * dim].view(-1, count, dim)

    def _run(self, to: PackedMap, x: torch.Tensor, norm: torch.Tensor | None, out: torch.Tensor, finish: int) -> None:
        call = to.call
        call.x, call.x_stride, call.rows = x.data_ptr(), x.stride(0), len(x)
        call.norm = None if norm is None else norm.data_ptr()
        call.out, call.out_stride = out.data_ptr(), out.stride(0)
        call.eps, call.finish = self._eps, finish
        self._library.linear(to.reference)

    def _memory(self, use: str, rows: int, columns: int) -> torch.Tensor:
        """Rows of the memory for this use, which grows to the most rows asked for."""
        key = (use, columns)
        have = self._rows.get(key)
        if have is None or len(have) < rows:
            have = self._rows[key] = torch.empty(rows, columns)
        return have[:rows]
