"""flash-attn 2 (package flash-attn).

Prefill by the varlen function over the block table, which does not split keys; decodes by the function for KV caches,
which does. Both take blocks of a multiple of 256 tokens alone.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F

from nexusengine.attention import external
from nexusengine.attention.base import AttentionCaps, AttentionMeta, AttentionSpec

_INSTALL = "pip install flash-attn --no-build-isolation"
_VARLEN = ("block_table", "softmax_scale", "causal", "window_size", "softcap")
_CACHED = ("cache_seqlens", *_VARLEN)


class Flash2Backend(external.External):
    name = "flash2"

    @classmethod
    def caps(cls) -> AttentionCaps:
        return AttentionCaps((256, 512, 768, 1024), external.HALF, graphs=True, modifiers=True)

    @classmethod
    def probe(cls) -> tuple[bool, str]:
        varlen, reason = external.find("flash_attn", "flash_attn_varlen_func", _VARLEN, _INSTALL)
        if varlen is None:
            return False, reason
        cached, reason = external.find("flash_attn", "flash_attn_with_kvcache", _CACHED, _INSTALL)
        return cached is not None, reason

    @classmethod
    def supports(cls, spec: AttentionSpec) -> tuple[bool, str]:
        return external.fits(spec, (8, 9, 10, 12))

    def __init__(self, spec: AttentionSpec) -> None:
        from flash_attn import flash_attn_varlen_func, flash_attn_with_kvcache

        self._varlen, self._cached = flash_attn_varlen_func, flash_attn_with_kvcache
        self._options = external.options_of(spec)
        self._cu_q = self._cu_k = torch.empty(0)

    def plan(self, meta: AttentionMeta) -> None:
        """Note where the rows of several tokens begin, counted from the first of them, in queries and in keys."""
        ones = meta.num_decodes
        if ones < len(meta.seq_lens_host):
            self._cu_q = meta.cu_seqlens_q[ones:] - ones
            self._cu_k = F.pad(meta.seq_lens[ones:].cumsum(0, dtype=torch.int32), (1, 0))

    def run(
        self,
        q: torch.Tensor,
        k_cache: torch.Tensor,
        v_cache: torch.Tensor,
        meta: AttentionMeta,
        out: torch.Tensor,
    ) -> None:
        ones = meta.num_decodes
        if ones:
            out[:ones] = self._cached(
                q[:ones].unsqueeze(1),
                k_cache,
                v_cache,
                cache_seqlens=meta.seq_lens[:ones],
                block_table=meta.block_table[:ones],
                **self._options,
            ).squeeze(1)
        if ones < len(meta.seq_lens_host):
            out[ones:] = self._varlen(
                q[ones:],
                k_cache,
                v_cache,
                self._cu_q,
                self._cu_k,
                meta.max_query_len,
                meta.max_seq_len,
                block_table=meta.block_table[ones:],
                **self._options,
            )
