"""Classes with the signatures of flashinfer's."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch

from tests.support.attention_standins.checks import attend, check, rows_of

# ---- flashinfer ------------------------------------------------------------------------------------------------------


@dataclass
class _Plan:
    starts: torch.Tensor
    blocks: torch.Tensor
    last: torch.Tensor
    size: int
    options: dict[str, Any]


class _PagedWrapper:
    _plan: _Plan

    def _remember(self, starts, blocks, last, heads, kv_heads, dim, size, **options) -> None:
        for host in (starts, last):
            check(host.dtype == torch.int32, "must be int32")
        check(blocks.dtype == torch.int32 and len(blocks) == int(starts[-1]), "paged_kv_indices")
        check(bool(((last > 0) & (last <= size)).all()), "paged_kv_last_page_len")
        check(dim in (64, 128, 256), f"Unsupported head_dim {dim}")
        self._shape = (heads, kv_heads, dim)
        self._plan = _Plan(starts, blocks, last, size, options)

    def _run(self, queries: list[torch.Tensor], q, cache, out, causal: bool):
        plan, (k_cache, v_cache) = self._plan, cache
        heads, kv_heads, dim = self._shape
        check(isinstance(cache, tuple), "Unrecognized paged_kv_cache type")
        check(q.dtype == plan.options["q_data_type"], "The dtype of q does not match the q_data_type")
        check(k_cache.dtype == plan.options["kv_data_type"], "The dtype of k does not match the kv_data_type")
        check(k_cache.shape[1:] == (plan.size, kv_heads, dim), "paged_kv_cache")
        check(out.shape == q.shape == (len(q), heads, dim) and out.dtype == q.dtype, "out")
        counts = plan.starts.diff()
        lengths = ((counts - 1) * plan.size + plan.last).tolist()
        table = torch.zeros(len(counts), int(counts.max()), dtype=torch.int32)
        for row, blocks in enumerate(plan.blocks.split(counts.tolist())):
            table[row, : len(blocks)] = blocks
        window = (plan.options["window_left"], -1)
        scale, cap = plan.options["sm_scale"], plan.options["logits_soft_cap"] or 0.0
        out.copy_(attend(queries, k_cache, v_cache, table, lengths, scale, causal, window, cap))
        return out


class Prefill(_PagedWrapper):
    def __init__(self, float_workspace_buffer, kv_layout="NHD", use_cuda_graph=False, backend="auto") -> None:
        check(float_workspace_buffer.data_ptr() % 16 == 0, "float_workspace_buffer must be 16-byte aligned")
        check(kv_layout == "NHD", "kv_layout")

    def plan(
        self,
        qo_indptr,
        paged_kv_indptr,
        paged_kv_indices,
        paged_kv_last_page_len,
        num_qo_heads,
        num_kv_heads,
        head_dim_qk,
        page_size,
        head_dim_vo=None,
        custom_mask=None,
        packed_custom_mask=None,
        causal=False,
        pos_encoding_mode="NONE",
        use_fp16_qk_reduction=False,
        sm_scale=None,
        window_left=-1,
        logits_soft_cap=None,
        rope_scale=None,
        rope_theta=None,
        q_data_type="float16",
        kv_data_type=None,
        non_blocking=True,
    ) -> None:
        self._starts, self._causal = qo_indptr, causal
        self._remember(
            paged_kv_indptr,
            paged_kv_indices,
            paged_kv_last_page_len,
            num_qo_heads,
            num_kv_heads,
            head_dim_qk,
            page_size,
            sm_scale=sm_scale,
            window_left=window_left,
            logits_soft_cap=logits_soft_cap,
            q_data_type=q_data_type,
            kv_data_type=kv_data_type or q_data_type,
        )

    def run(self, q, paged_kv_cache, *args, out=None, return_lse=False):
        if len(q) != int(self._starts[-1]):
            raise ValueError(f"q.shape[0] ({len(q)}) does not match qo_indptr[-1] ({int(self._starts[-1])})")
        return self._run(rows_of(q, self._starts, len(q)), q, paged_kv_cache, out, self._causal)


class Decode(_PagedWrapper):
    def __init__(
        self, float_workspace_buffer, kv_layout="NHD", use_cuda_graph=False, use_tensor_cores=False, backend="auto"
    ) -> None:
        check(float_workspace_buffer.data_ptr() % 16 == 0, "float_workspace_buffer must be 16-byte aligned")
        check(kv_layout == "NHD", "kv_layout")

    def plan(
        self,
        indptr,
        indices,
        last_page_len,
        num_qo_heads,
        num_kv_heads,
        head_dim,
        page_size,
        pos_encoding_mode="NONE",
        window_left=-1,
        logits_soft_cap=None,
        q_data_type="float16",
        kv_data_type=None,
        data_type=None,
        sm_scale=None,
        rope_scale=None,
        rope_theta=None,
        non_blocking=True,
    ) -> None:
        self._remember(
            indptr,
            indices,
            last_page_len,
            num_qo_heads,
            num_kv_heads,
            head_dim,
            page_size,
            sm_scale=sm_scale,
            window_left=window_left,
            logits_soft_cap=logits_soft_cap,
            q_data_type=q_data_type,
            kv_data_type=kv_data_type or q_data_type,
        )

    def run(self, q, paged_kv_cache, *args, out=None, return_lse=False):
        if len(q) != len(self._plan.last):
            raise ValueError(f"q.shape[0] ({len(q)}) does not match batch_size ({len(self._plan.last)})")
        return self._run(list(q.unsqueeze(1)), q, paged_kv_cache, out, False)
