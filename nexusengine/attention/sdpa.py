"""Gather the cached K and V of a sequence, then torch's scaled_dot_product_attention. Works everywhere; the reference.

One call a sequence. The query heads that share a KV head are packed into its query axis, so K and V are never
repeated. Exactly the tokens of the sequence are gathered: what lies in unused slots cannot leak.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F

from nexusengine.attention.base import AttentionCaps, AttentionMeta, AttentionSpec


class SdpaBackend:
    name = "sdpa"

    @classmethod
    def caps(cls) -> AttentionCaps:
        return AttentionCaps((16, 32, 64, 128, 256, 8, 4, 2, 1), (torch.float32, torch.float16, torch.bfloat16))

    @classmethod
    def probe(cls) -> tuple[bool, str]:
        return True, "part of torch"

    @classmethod
    def supports(cls, spec: AttentionSpec) -> tuple[bool, str]:
        if spec.dtype not in cls.caps().dtypes:
            return False, f"does not compute in {spec.dtype}"
        return True, "any shape"

    def __init__(self, spec: AttentionSpec) -> None:
        self._spec = spec
        self._masks: list[torch.Tensor | None] = []
        self._blocks: list[torch.Tensor] = []

    def plan(self, meta: AttentionMeta) -> None:
        size, groups = self._spec.block_size, self._spec.num_heads // self._spec.num_kv_heads
        self._blocks = [meta.block_table[r, : -(-n // size)].long() for r, n in enumerate(meta.seq_lens_host)]
        self._masks = [
            None if q == 1 else _causal(q, n, self._spec.device).repeat(groups, 1)
            for q, n in zip(meta.query_lens_host, meta.seq_lens_host, strict=True)
        ]

    def store(
        self, k: torch.Tensor, v: torch.Tensor, k_cache: torch.Tensor, v_cache: torch.Tensor, meta: AttentionMeta
    ) -> None:
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
        heads, kv_heads, dim = self._spec.num_heads, self._spec.num_kv_heads, self._spec.head_dim
        groups, start = heads // kv_heads, 0
        rows = zip(meta.query_lens_host, meta.seq_lens_host, self._blocks, self._masks, strict=True)
        for length, total, blocks, mask in rows:
            keys = k_cache[blocks].view(-1, kv_heads, dim)[:total].transpose(0, 1)
            values = v_cache[blocks].view(-1, kv_heads, dim)[:total].transpose(0, 1)
            # [length, H, D] -> [H_kv, groups * length, D]: head h belongs to KV head h // groups
            packed = q[start : start + length].view(length, kv_heads, groups, dim).permute(1, 2, 0, 3)
            packed = packed.reshape(kv_heads, groups * length, dim)
            result = F.scaled_dot_product_attention(
                packed[None], keys[None], values[None], attn_mask=mask, scale=self._spec.scale
            )[0]
            result = result.view(kv_heads, groups, length, dim).permute(2, 0, 1, 3)
            out[start : start + length] = result.reshape(length, heads, dim)
            start += length


def _causal(queries: int, keys: int, device: torch.device) -> torch.Tensor:
    """bool [queries, keys], True where a query may look: bottom-right aligned."""
    return torch.ones(queries, keys, dtype=torch.bool, device=device).tril(keys - queries)
