"""Attention by our Triton kernels: decodes split over their keys, everything else by tiles of queries.

The size of a row's splits depends on its own length alone, so that its numbers never depend on the rows beside it.
Grids depend on the plan alone (rows, tokens, longest row), so that a launch can be captured in a CUDA graph and
replayed with other lengths up to the longest planned. Memory between a decode's two kernels is allocated in `run`, so
that it is the graph's own where one is captured.
"""

from __future__ import annotations

import torch

from nexusengine.attention.base import FP8, AttentionCaps, AttentionMeta, AttentionSpec
from nexusengine.triton_kernels import launch

_SPLIT_TOKENS = 256
"""Of a decode's keys for one program: 8,192 tokens over 8 KV heads keep 256 programs busy with one row alone."""
_MOST_SPLITS = 64
"""Of a row; longer ones have larger splits. Without this limit 256 rows of up to 131,072 tokens need 2 GB between a
decode's two kernels, and with it an eighth."""


class TritonBackend:
    name = "triton"

    @classmethod
    def caps(cls) -> AttentionCaps:
        sizes = (16, *(size for size in range(1, 1025) if size != 16))
        return AttentionCaps(
            sizes, (torch.float16, torch.bfloat16, torch.float32), True, modifiers=True, fp8_cache=True
        )

    @classmethod
    def probe(cls) -> tuple[bool, str]:
        device = "cuda" if torch.cuda.is_available() else "cpu"
        return launch.probe(torch.device(device))

    @classmethod
    def supports(cls, spec: AttentionSpec) -> tuple[bool, str]:
        available, reason = launch.probe(spec.device)
        if not available:
            return False, reason
        if spec.dtype not in cls.caps().dtypes:
            return False, f"does not compute in {spec.dtype}"
        if spec.dtype == torch.bfloat16 and spec.device.type == "cuda" and launch.capability(spec.device) < (8, 0):
            return False, "bfloat16 needs compute capability 8.0"
        if (
            spec.kv_dtype == FP8
            and spec.device.type == "cuda"
            and launch.capability(spec.device) < launch.FP8_CAPABILITY
        ):
            return False, "K and V of 8 bits need compute capability 8.9"
        if spec.num_heads % spec.num_kv_heads or spec.head_dim > 256:
            return False, f"{spec.num_heads} heads of {spec.head_dim} over {spec.num_kv_heads} KV heads"
        return True, f"any shape up to head dimension 256 ({reason})"

    def __init__(self, spec: AttentionSpec) -> None:
        from nexusengine.triton_kernels.attention import Shape

        self._shape = Shape(
            spec.num_heads,
            spec.num_kv_heads,
            spec.head_dim,
            spec.block_size,
            spec.scale,
            spec.window or 0,
            spec.soft_cap or 0.0,
        )
        self._capability = launch.capability(spec.device)
        self.num_splits = 1

    def plan(self, meta: AttentionMeta) -> None:
        """A mixed step's splits are those of its decodes, however long its prompts are."""
        longest = meta.max_seq_len
        if meta.max_query_len > 1:
            longest = max(meta.seq_lens_host[: meta.num_decodes], default=1)
        self.num_splits = min(max(-(-longest // _SPLIT_TOKENS), 1), _MOST_SPLITS)

    def store(
        self, k: torch.Tensor, v: torch.Tensor, k_cache: torch.Tensor, v_cache: torch.Tensor, meta: AttentionMeta
    ) -> None:
        """Models come here only by another table of operations; TritonOps stores while it rotates."""
        from nexusengine.triton_kernels.rope import store

        store(k, v, k_cache, v_cache, meta.slot_mapping)

    def run(
        self,
        q: torch.Tensor,
        k_cache: torch.Tensor,
        v_cache: torch.Tensor,
        meta: AttentionMeta,
        out: torch.Tensor,
    ) -> None:
        """The heads of a token lie side by side in q and out; tokens may lie apart."""
        from nexusengine.triton_kernels import decode_attention, prefill_attention

        ones = meta.num_decodes
        if ones:
            decode_attention.decode(
                q[:ones], k_cache, v_cache, meta.block_table[:ones], meta.seq_lens[:ones], out[:ones], self._shape,
                self.num_splits, _SPLIT_TOKENS, self._capability, _MOST_SPLITS,
            )  # fmt: skip
        if len(meta.seq_lens) > ones:
            prefill_attention.prefill(
                q, k_cache, v_cache, meta.block_table, meta.seq_lens, meta.cu_seqlens_q, out, self._shape, ones,
                self._capability,
            )  # fmt: skip
