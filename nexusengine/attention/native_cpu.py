"""Attention on the CPU kernels: straight from the block table, nothing gathered or padded (native/src/attention.h)."""

from __future__ import annotations

import torch

from nexusengine.attention.base import AttentionCaps, AttentionMeta, AttentionSpec
from nexusengine.native import Prepared, library, probe, structs
from nexusengine.native.cache import cache_of

_SIZES = (16, *(size for size in range(1, 1025) if size != 16))
_CAPS = AttentionCaps(_SIZES, (torch.float32,), graphs=True, plain_cache=False)


class NativeCpuBackend:
    name = "cpu"

    @classmethod
    def caps(cls) -> AttentionCaps:
        return _CAPS

    @classmethod
    def probe(cls) -> tuple[bool, str]:
        return probe()

    @classmethod
    def supports(cls, spec: AttentionSpec) -> tuple[bool, str]:
        if spec.device.type != "cpu":
            return False, f"runs on a CPU, not on {spec.device}"
        if spec.dtype not in cls.caps().dtypes:
            return False, f"does not compute in {spec.dtype}"
        if spec.num_heads % spec.num_kv_heads or spec.head_dim % 2:
            return False, f"{spec.num_heads} heads of {spec.head_dim} over {spec.num_kv_heads} KV heads"
        return True, "any shape in float32"

    def __init__(self, spec: AttentionSpec) -> None:
        self._library = library()
        self._dim = spec.head_dim
        self._call = structs.Attention(
            heads=spec.num_heads, kv_heads=spec.num_kv_heads, dim=spec.head_dim, scale=spec.scale
        )
        self._prepared = Prepared(self._call)

    def plan(self, meta: AttentionMeta) -> None:
        call = self._call
        call.table, call.table_stride = meta.block_table.data_ptr(), meta.block_table.stride(0)
        call.lengths, call.starts = meta.seq_lens.data_ptr(), meta.cu_seqlens_q.data_ptr()
        call.rows = len(meta.seq_lens)

    def store(
        self, k: torch.Tensor, v: torch.Tensor, k_cache: torch.Tensor, v_cache: torch.Tensor, meta: AttentionMeta
    ) -> None:
        """Models come here only by another table of operations; NativeOps stores while it rotates."""
        slots = meta.slot_mapping.clamp_min(0)  # skipped tokens land in the null block, which nobody reads
        k_cache.view(-1, *k.shape[1:])[slots] = k
        v_cache.view(-1, *v.shape[1:])[slots] = v

    def run(
        self,
        q: torch.Tensor,
        k_cache: torch.Tensor,
        v_cache: torch.Tensor,
        meta: AttentionMeta,
        out: torch.Tensor,
    ) -> None:
        """The heads of a token lie side by side in q and out; tokens may lie apart."""
        call = self._call
        call.q, call.q_stride = q.data_ptr(), q.stride(0)
        call.out, call.out_stride = out.data_ptr(), out.stride(0)
        call.cache = cache_of(k_cache, v_cache, self._dim)
        self._library.run(self._prepared)
