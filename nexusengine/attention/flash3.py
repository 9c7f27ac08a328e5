"""flash-attn 3 (module flash_attn_interface, built from the Hopper folder of flash-attention).

One call for queries of any length over blocks of any size, keys split where that helps.
"""

from __future__ import annotations

import torch

from nexusengine.attention import external
from nexusengine.attention.base import FP8, AttentionCaps, AttentionMeta, AttentionSpec, as_stored

_INSTALL = "build it from the folder hopper of the flash-attention sources"
_NEEDED = (
    "cache_seqlens",
    "page_table",
    "cu_seqlens_q",
    "max_seqlen_q",
    "softmax_scale",
    "causal",
    "window_size",
    "softcap",
)


class Flash3Backend(external.External):
    name = "flash3"

    @classmethod
    def caps(cls) -> AttentionCaps:
        sizes = (16, *(size for size in range(1, 1025) if size != 16))
        return AttentionCaps(sizes, external.HALF, graphs=True, modifiers=True, fp8_cache=True)

    @classmethod
    def probe(cls) -> tuple[bool, str]:
        found, reason = external.find("flash_attn_interface", "flash_attn_with_kvcache", _NEEDED, _INSTALL)
        return found is not None, reason

    @classmethod
    def supports(cls, spec: AttentionSpec) -> tuple[bool, str]:
        if spec.kv_dtype == FP8 and spec.head_dim % 16:
            return False, f"with K and V of 8 bits, head dimensions are multiples of 16, not {spec.head_dim}"
        return external.fits(spec, (9,))

    def __init__(self, spec: AttentionSpec) -> None:
        from flash_attn_interface import flash_attn_with_kvcache

        self._attend = flash_attn_with_kvcache
        self._options = external.options_of(spec)
        self._make_finite = external.Finite()

    def run(
        self,
        q: torch.Tensor,
        k_cache: torch.Tensor,
        v_cache: torch.Tensor,
        meta: AttentionMeta,
        out: torch.Tensor,
    ) -> None:
        """With K and V of 8 bits q has to have as many: it is rounded as it is, and the result is bfloat16."""
        self._make_finite(v_cache)
        out.copy_(
            self._attend(
                as_stored(q, k_cache),
                k_cache,
                v_cache,
                cache_seqlens=meta.seq_lens,
                page_table=meta.block_table,
                cu_seqlens_q=meta.cu_seqlens_q,
                max_seqlen_q=meta.max_query_len,
                **self._options,
            )
        )
