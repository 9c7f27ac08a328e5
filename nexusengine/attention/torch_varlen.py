"""torch's own varlen attention with a block table (torch 2.12 and later): flash-attn 2 as torch brings it.

Keys are split. Blocks of a multiple of 256 tokens; no soft cap.
"""

from __future__ import annotations

from typing import Any

import torch

from nexusengine.attention import external
from nexusengine.attention.base import AttentionCaps, AttentionMeta, AttentionSpec

_INSTALL = "torch 2.12 or later has it"
_NEEDED = ("out", "scale", "window_size", "enable_gqa", "seqused_k", "block_table", "num_splits")


class TorchVarlenBackend(external.External):
    name = "torch-varlen"

    @classmethod
    def caps(cls) -> AttentionCaps:
        return AttentionCaps((256, 512, 768, 1024), external.HALF, graphs=True, modifiers=True)

    @classmethod
    def probe(cls) -> tuple[bool, str]:
        found, reason = external.find("torch.nn.attention.varlen", "varlen_attn_out", _NEEDED, _INSTALL)
        return found is not None, reason

    @classmethod
    def supports(cls, spec: AttentionSpec) -> tuple[bool, str]:
        if spec.soft_cap:
            return False, "knows no soft caps"
        return external.fits(spec, (8, 9, 10, 12))

    def __init__(self, spec: AttentionSpec) -> None:
        from torch.nn.attention.varlen import varlen_attn_out

        self._attend = varlen_attn_out
        self._options: dict[str, Any] = {"scale": spec.scale, "enable_gqa": spec.num_heads != spec.num_kv_heads}
        self._window = external.window_of(spec)
        self._cu_k: dict[int, torch.Tensor] = {}

    def plan(self, meta: AttentionMeta) -> None:
        """Note where each row's keys would begin if they lay side by side.

        The kernel wants to see it, though it reads what seqused_k says. For each number of rows at a place that stays,
        as graphs need it.
        """
        rows = len(meta.seq_lens)
        if rows not in self._cu_k:
            self._cu_k[rows] = torch.zeros(rows + 1, dtype=torch.int32, device=meta.seq_lens.device)
        torch.cumsum(meta.seq_lens, 0, dtype=torch.int32, out=self._cu_k[rows][1:])

    def run(
        self,
        q: torch.Tensor,
        k_cache: torch.Tensor,
        v_cache: torch.Tensor,
        meta: AttentionMeta,
        out: torch.Tensor,
    ) -> None:
        """Decodes run by themselves: only there are heads packed and keys split, if nothing limits what rows see."""
        ones, rows = meta.num_decodes, len(meta.seq_lens)
        cu_k = self._cu_k[rows]
        if ones:
            self._attend(
                out[:ones],
                q[:ones],
                k_cache,
                v_cache,
                meta.cu_seqlens_q[: ones + 1],
                cu_k[: ones + 1],
                1,
                meta.max_seq_len,
                window_size=self._window,
                seqused_k=meta.seq_lens[:ones],
                block_table=meta.block_table[:ones],
                **self._options,
            )
        if ones < rows:
            self._attend(
                out[ones:],
                q[ones:],
                k_cache,
                v_cache,
                meta.cu_seqlens_q[ones:] - ones,
                cu_k[ones:] - cu_k[ones],
                meta.max_query_len,
                meta.max_seq_len,
                window_size=(self._window[0], 0),
                seqused_k=meta.seq_lens[ones:],
                block_table=meta.block_table[ones:],
                **self._options,
            )
