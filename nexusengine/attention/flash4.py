"""flash-attn 4 (package flash-attn-4, module flash_attn.cute) for data-centre Blackwell.

One call for queries of any length; blocks of 128 tokens are what its fast loads want. It has no paged KV on sm80 and
sm120, and does not split keys on sm90.
"""

from __future__ import annotations

import torch

from nexusengine.attention import external
from nexusengine.attention.base import AttentionCaps, AttentionMeta, AttentionSpec

_INSTALL = "pip install --pre flash-attn-4"
_NEEDED = (
    "cu_seqlens_q",
    "max_seqlen_q",
    "max_seqlen_k",
    "seqused_k",
    "page_table",
    "softmax_scale",
    "causal",
    "window_size",
    "softcap",
    "num_splits",
)
_SPLITS_BY_THEMSELVES = 0


class Flash4Backend(external.External):
    name = "flash4"

    @classmethod
    def caps(cls) -> AttentionCaps:
        return AttentionCaps((128,), external.HALF, graphs=True, modifiers=True)

    @classmethod
    def probe(cls) -> tuple[bool, str]:
        found, reason = external.find("flash_attn.cute", "flash_attn_varlen_func", _NEEDED, _INSTALL)
        return found is not None, reason

    @classmethod
    def supports(cls, spec: AttentionSpec) -> tuple[bool, str]:
        return external.fits(spec, (10, 11), max_dim=128)

    def __init__(self, spec: AttentionSpec) -> None:
        from flash_attn.cute import flash_attn_varlen_func

        self._attend = flash_attn_varlen_func
        self._options = external.options_of(spec) | {"num_splits": _SPLITS_BY_THEMSELVES}
        if not spec.window:
            self._options["window_size"] = (None, None)  # how it says that there is none
        self._make_finite = external.Finite()

    def run(
        self,
        q: torch.Tensor,
        k_cache: torch.Tensor,
        v_cache: torch.Tensor,
        meta: AttentionMeta,
        out: torch.Tensor,
    ) -> None:
        self._make_finite(v_cache)
        result = self._attend(
            q,
            k_cache,
            v_cache,
            cu_seqlens_q=meta.cu_seqlens_q,
            max_seqlen_q=meta.max_query_len,
            max_seqlen_k=meta.max_seq_len,
            seqused_k=meta.seq_lens,
            page_table=meta.block_table,
            **self._options,
        )
        out.copy_(result[0] if isinstance(result, tuple) else result)
