"""Stand-ins for libraries that need a GPU: their signatures and what they insist on, over the answers of `oracle`.

Signatures and checks are those of flash-attn 2.8 (flash_attn_interface.py, flash_api.cpp), flash-attn 3 (the folder
hopper, the same two files), flash-attn-4 4.0.0b36 (cute/interface.py), torch 2.13 (nn/attention/varlen.py) and
flashinfer-python 0.7.2 (prefill.py, decode.py), without that tensors lie on a GPU. A call that these let pass may still
be slow, or wrong in a way they do not know.
"""

from __future__ import annotations

import sys
import types
from dataclasses import dataclass
from typing import Any

import pytest
import torch

from nexusengine.attention.base import FP8

from .attention_cases import oracle


def _check(fact: bool, message: str) -> None:
    if not fact:
        raise RuntimeError(message)


def _attend(
    rows: list[torch.Tensor],
    k_cache: torch.Tensor,
    v_cache: torch.Tensor,
    table: torch.Tensor,
    lengths: list[int],
    scale: float | None,
    causal: bool,
    window: tuple[int | None, int | None],
    soft_cap: float,
    whole_pages: bool = False,
) -> torch.Tensor:
    """rows: queries `[q, H, D]` of each row -> `[T, H, D]`. whole_pages: V of a row's last page is multiplied even past
    the row's end, with the weight 0."""
    left, right = (-1 if side is None else side for side in window)
    assert right in (-1, 0), "the engine's attention looks back only"
    size, results = k_cache.shape[1], []
    for q, blocks, n in zip(rows, table, lengths, strict=True):
        assert causal or right == 0 or len(q) == 1, "queries would see keys after their own"
        used = blocks[: -(-n // size)].long()
        k, v = (cache[used].flatten(0, 1)[:n].float() for cache in (k_cache, v_cache))
        result = oracle(q.float(), k, v, q.shape[-1] ** -0.5 if scale is None else scale, left + 1, soft_cap)
        if whole_pages and n:
            result = result + 0.0 * v_cache[used[-1]].float().sum()
        results.append(result.to(torch.bfloat16 if q.dtype == FP8 else q.dtype))
    return torch.cat(results)


def _check_paged(
    q: torch.Tensor,
    k_cache: torch.Tensor,
    v_cache: torch.Tensor,
    table: torch.Tensor,
    rows: int,
    dtypes: tuple[torch.dtype, ...] = (torch.float16, torch.bfloat16),
) -> None:
    _check(q.dtype in dtypes, "FlashAttention only support fp16 and bf16 data type")
    _check(k_cache.dtype == q.dtype == v_cache.dtype, "query, key and value must have the same dtype")
    _check(all(t.stride(-1) == 1 for t in (q, k_cache, v_cache)), "Input tensor must have contiguous last dimension")
    _check(table.dtype == torch.int32, "block_table must have dtype torch.int32")
    _check(table.stride(-1) == 1, "block_table must have contiguous last dimension")
    _check(k_cache.shape == v_cache.shape and k_cache.shape[-1] == q.shape[-1], "shape")
    _check(table.shape[0] == rows, "block_table must have the shape [batch_size, max_num_blocks_per_seq]")
    _check(rows > 0, "batch size must be positive")
    _check(q.shape[-1] <= 256, "FlashAttention forward only supports head dimension at most 256")
    _check(q.shape[-2] % k_cache.shape[2] == 0, "Number of heads in key/value must divide number of heads in query")


def _check_int32(*tensors: torch.Tensor) -> None:
    for tensor in tensors:
        _check(tensor.dtype == torch.int32 and tensor.is_contiguous(), "must be contiguous and have dtype int32")


def _rows(q: torch.Tensor, cu: torch.Tensor, longest: int) -> list[torch.Tensor]:
    counts = cu.diff()
    _check(int(cu[0]) == 0 and int(cu[-1]) == len(q) and int(counts.max()) <= longest, "cu_seqlens_q")
    return list(q.split(counts.tolist()))


# ---- flash-attn 2 ----------------------------------------------------------------------------------------------------


def flash2_varlen(
    q,
    k,
    v,
    cu_seqlens_q,
    cu_seqlens_k,
    max_seqlen_q,
    max_seqlen_k,
    dropout_p=0.0,
    softmax_scale=None,
    causal=False,
    window_size=(-1, -1),
    softcap=0.0,
    alibi_slopes=None,
    deterministic=False,
    return_attn_probs=False,
    block_table=None,
):
    rows = len(cu_seqlens_q) - 1
    _check_int32(cu_seqlens_q, cu_seqlens_k)
    _check_paged(q, k, v, block_table, rows)
    _check(k.shape[1] % 256 == 0, "Paged KV cache block size must be divisible by 256")
    _check(len(cu_seqlens_k) == rows + 1, "cu_seqlens_k must have shape (batch_size + 1)")
    lengths = cu_seqlens_k.diff().tolist()
    _check(max(lengths) <= max_seqlen_k, "max_seqlen_k")
    queries = _rows(q, cu_seqlens_q, max_seqlen_q)
    return _attend(queries, k, v, block_table, lengths, softmax_scale, causal, window_size, softcap)


def flash2_with_kvcache(
    q,
    k_cache,
    v_cache,
    k=None,
    v=None,
    rotary_cos=None,
    rotary_sin=None,
    cache_seqlens=None,
    cache_batch_idx=None,
    cache_leftpad=None,
    block_table=None,
    softmax_scale=None,
    causal=False,
    window_size=(-1, -1),
    softcap=0.0,
    rotary_interleaved=True,
    alibi_slopes=None,
    num_splits=0,
    return_softmax_lse=False,
):
    _check(q.dim() == 4, "q must have the shape [batch_size, seqlen_q, num_heads, head_size]")
    _check_int32(cache_seqlens)
    _check_paged(q, k_cache, v_cache, block_table, len(q))
    _check(k_cache.shape[1] % 256 == 0, "Paged KV cache block size must be divisible by 256")
    _check(cache_seqlens.shape == (len(q),), "seqlens_k must have shape (batch_size)")
    lengths = cache_seqlens.tolist()
    result = _attend(list(q), k_cache, v_cache, block_table, lengths, softmax_scale, causal, window_size, softcap)
    return result.view(q.shape)


# ---- flash-attn 3 ----------------------------------------------------------------------------------------------------


def flash3_with_kvcache(
    q,
    k_cache,
    v_cache,
    k=None,
    v=None,
    qv=None,
    rotary_cos=None,
    rotary_sin=None,
    cache_seqlens=None,
    cache_batch_idx=None,
    cache_leftpad=None,
    page_table=None,
    cu_seqlens_q=None,
    cu_seqlens_k_new=None,
    max_seqlen_q=None,
    rotary_seqlens=None,
    q_descale=None,
    k_descale=None,
    v_descale=None,
    softmax_scale=None,
    causal=False,
    window_size=(-1, -1),
    attention_chunk=0,
    softcap=0.0,
    rotary_interleaved=True,
    scheduler_metadata=None,
    num_splits=0,
    pack_gqa=None,
    sm_margin=0,
    return_softmax_lse=False,
):
    _check(max_seqlen_q is not None, "max_seqlen_q must be provided if cu_seqlens_q is provided")
    rows = len(cu_seqlens_q) - 1
    _check_int32(cu_seqlens_q, cache_seqlens)
    _check_paged(q, k_cache, v_cache, page_table, rows, (torch.float16, torch.bfloat16, FP8))
    alignment = 16 if q.dtype == FP8 else 8
    _check(q.shape[-1] % alignment == 0, f"head_size should be a multiple of {alignment}")
    _check(cache_seqlens.shape == (rows,), "seqused_k must have shape (batch_size)")
    queries, lengths = _rows(q, cu_seqlens_q, max_seqlen_q), cache_seqlens.tolist()
    return _attend(
        queries, k_cache, v_cache, page_table, lengths, softmax_scale, causal, window_size, softcap, whole_pages=True
    )


# ---- flash-attn 4 ----------------------------------------------------------------------------------------------------


def flash4_varlen(
    q,
    k,
    v,
    qv=None,
    cu_seqlens_q=None,
    cu_seqlens_k=None,
    max_seqlen_q=None,
    max_seqlen_k=None,
    min_seqlen_k=None,
    seqused_q=None,
    seqused_k=None,
    gather_kv_indices=None,
    page_table=None,
    softmax_scale=None,
    causal=False,
    window_size=(None, None),
    learnable_sink=None,
    softcap=0.0,
    num_splits=1,
    pack_gqa=None,
    deterministic=False,
    score_mod=None,
    score_mod_bwd=None,
    mask_mod=None,
    block_sparse_tensors=None,
    aux_tensors=None,
    aux_scalars=None,
    return_lse=False,
    scheduler_metadata=None,
    seqlen_k_per_split=None,
    disable_scheduler_metadata=False,
    gather_bwd_recompute_p=False,
    gather_bwd_token_chunk=None,
):
    """As on compute capability 10.0."""
    rows = len(cu_seqlens_q) - 1
    _check(cu_seqlens_k is None, "page_table is not supported with cu_seqlens_k")
    _check_int32(cu_seqlens_q, seqused_k)
    _check_paged(q, k, v, page_table, rows)
    _check(seqused_k.shape == (rows,), "seqused_k must have shape (batch_size,)")
    _check(q.shape[-1] % 8 == 0 and 8 <= q.shape[-1] <= 128, "head_dim must be between 8 and 128 and divisible by 8")
    queries, lengths = _rows(q, cu_seqlens_q, max_seqlen_q), seqused_k.tolist()
    _check(max(lengths) <= max_seqlen_k, "max_seqlen_k")
    whole_pages = k.shape[1] == 128  # only then are pages loaded by TMA
    result = _attend(queries, k, v, page_table, lengths, softmax_scale, causal, window_size, softcap, whole_pages)
    return result, None


# ---- torch -----------------------------------------------------------------------------------------------------------


def torch_varlen_out(
    out,
    query,
    key,
    value,
    cu_seq_q,
    cu_seq_k,
    max_q,
    max_k,
    *,
    return_aux=None,
    scale=None,
    window_size=(-1, -1),
    enable_gqa=False,
    seqused_k=None,
    block_table=None,
    num_splits=None,
):
    rows = len(cu_seq_q) - 1
    if not enable_gqa and query.shape[1] != key.shape[2]:
        raise ValueError("Expect query and key/value to have the same number of heads")
    _check_int32(cu_seq_q, cu_seq_k, seqused_k)
    _check_paged(query, key, value, block_table, rows)
    _check(key.shape[1] % 256 == 0, "Paged KV cache block size must be divisible by 256")
    _check(len(cu_seq_k) == rows + 1 and seqused_k.shape == (rows,), "shape")
    _check(out.dtype == query.dtype and out.stride(-1) == 1 and out.shape == query.shape, "out")
    _check(cu_seq_k.diff().tolist() == seqused_k.tolist(), "cu_seq_k")
    queries, lengths = _rows(query, cu_seq_q, max_q), seqused_k.tolist()
    _check(max(lengths) <= max_k, "max_k")
    causal = tuple(window_size) == (-1, 0)
    out.copy_(_attend(queries, key, value, block_table, lengths, scale, causal, window_size, 0.0))
    return out


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
            _check(host.dtype == torch.int32, "must be int32")
        _check(blocks.dtype == torch.int32 and len(blocks) == int(starts[-1]), "paged_kv_indices")
        _check(bool(((last > 0) & (last <= size)).all()), "paged_kv_last_page_len")
        _check(dim in (64, 128, 256), f"Unsupported head_dim {dim}")
        self._shape = (heads, kv_heads, dim)
        self._plan = _Plan(starts, blocks, last, size, options)

    def _run(self, queries: list[torch.Tensor], q, cache, out, causal: bool):
        plan, (k_cache, v_cache) = self._plan, cache
        heads, kv_heads, dim = self._shape
        _check(isinstance(cache, tuple), "Unrecognized paged_kv_cache type")
        _check(q.dtype == plan.options["q_data_type"], "The dtype of q does not match the q_data_type")
        _check(k_cache.dtype == plan.options["kv_data_type"], "The dtype of k does not match the kv_data_type")
        _check(k_cache.shape[1:] == (plan.size, kv_heads, dim), "paged_kv_cache")
        _check(out.shape == q.shape == (len(q), heads, dim) and out.dtype == q.dtype, "out")
        counts = plan.starts.diff()
        lengths = ((counts - 1) * plan.size + plan.last).tolist()
        table = torch.zeros(len(counts), int(counts.max()), dtype=torch.int32)
        for row, blocks in enumerate(plan.blocks.split(counts.tolist())):
            table[row, : len(blocks)] = blocks
        window = (plan.options["window_left"], -1)
        scale, cap = plan.options["sm_scale"], plan.options["logits_soft_cap"] or 0.0
        out.copy_(_attend(queries, k_cache, v_cache, table, lengths, scale, causal, window, cap))
        return out


class Prefill(_PagedWrapper):
    def __init__(self, float_workspace_buffer, kv_layout="NHD", use_cuda_graph=False, backend="auto") -> None:
        _check(float_workspace_buffer.data_ptr() % 16 == 0, "float_workspace_buffer must be 16-byte aligned")
        _check(kv_layout == "NHD", "kv_layout")

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
        return self._run(_rows(q, self._starts, len(q)), q, paged_kv_cache, out, self._causal)


class Decode(_PagedWrapper):
    def __init__(
        self, float_workspace_buffer, kv_layout="NHD", use_cuda_graph=False, use_tensor_cores=False, backend="auto"
    ) -> None:
        _check(float_workspace_buffer.data_ptr() % 16 == 0, "float_workspace_buffer must be 16-byte aligned")
        _check(kv_layout == "NHD", "kv_layout")

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


def _module(name: str, **members: Any) -> types.ModuleType:
    made = types.ModuleType(name)
    made.__dict__.update(members)
    return made


MODULES: dict[str, dict[str, types.ModuleType]] = {
    "flash2": {
        "flash_attn": _module(
            "flash_attn", flash_attn_varlen_func=flash2_varlen, flash_attn_with_kvcache=flash2_with_kvcache
        )
    },
    "flash3": {
        "flash_attn_interface": _module("flash_attn_interface", flash_attn_with_kvcache=flash3_with_kvcache),
    },
    "flash4": {
        "flash_attn": _module("flash_attn"),
        "flash_attn.cute": _module("flash_attn.cute", flash_attn_varlen_func=flash4_varlen),
    },
    "torch-varlen": {
        "torch.nn.attention.varlen": _module("torch.nn.attention.varlen", varlen_attn_out=torch_varlen_out),
    },
    "flashinfer": {
        "flashinfer": _module(
            "flashinfer", BatchPrefillWithPagedKVCacheWrapper=Prefill, BatchDecodeWithPagedKVCacheWrapper=Decode
        ),
    },
}
"""What `import` finds for each backend."""
CAPABILITY = {"flash2": (8, 0), "flash3": (9, 0), "flash4": (10, 0), "torch-varlen": (9, 0), "flashinfer": (8, 9)}


def install(name: str, patch: pytest.MonkeyPatch) -> None:
    """Lets a backend find its stand-in, and take this machine for a GPU that it likes."""
    for module, stand_in in MODULES[name].items():
        patch.setitem(sys.modules, module, stand_in)
    patch.setattr("nexusengine.attention.external.capability", lambda device: CAPABILITY[name])
