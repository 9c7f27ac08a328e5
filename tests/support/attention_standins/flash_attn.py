"""Functions with the signatures of flash-attn 2, 3 and 4, and of torch's own."""

from __future__ import annotations

import torch

from nexusengine.attention.base import FP8
from tests.support.attention_standins.checks import attend, check, check_int32, check_paged, rows_of

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
    check_int32(cu_seqlens_q, cu_seqlens_k)
    check_paged(q, k, v, block_table, rows)
    check(k.shape[1] % 256 == 0, "Paged KV cache block size must be divisible by 256")
    check(len(cu_seqlens_k) == rows + 1, "cu_seqlens_k must have shape (batch_size + 1)")
    lengths = cu_seqlens_k.diff().tolist()
    check(max(lengths) <= max_seqlen_k, "max_seqlen_k")
    queries = rows_of(q, cu_seqlens_q, max_seqlen_q)
    return attend(queries, k, v, block_table, lengths, softmax_scale, causal, window_size, softcap)


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
    check(q.dim() == 4, "q must have the shape [batch_size, seqlen_q, num_heads, head_size]")
    check_int32(cache_seqlens)
    check_paged(q, k_cache, v_cache, block_table, len(q))
    check(k_cache.shape[1] % 256 == 0, "Paged KV cache block size must be divisible by 256")
    check(cache_seqlens.shape == (len(q),), "seqlens_k must have shape (batch_size)")
    lengths = cache_seqlens.tolist()
    result = attend(list(q), k_cache, v_cache, block_table, lengths, softmax_scale, causal, window_size, softcap)
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
    check(max_seqlen_q is not None, "max_seqlen_q must be provided if cu_seqlens_q is provided")
    rows = len(cu_seqlens_q) - 1
    check_int32(cu_seqlens_q, cache_seqlens)
    check_paged(q, k_cache, v_cache, page_table, rows, (torch.float16, torch.bfloat16, FP8))
    alignment = 16 if q.dtype == FP8 else 8
    check(q.shape[-1] % alignment == 0, f"head_size should be a multiple of {alignment}")
    check(cache_seqlens.shape == (rows,), "seqused_k must have shape (batch_size)")
    queries, lengths = rows_of(q, cu_seqlens_q, max_seqlen_q), cache_seqlens.tolist()
    return attend(
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
    check(cu_seqlens_k is None, "page_table is not supported with cu_seqlens_k")
    check_int32(cu_seqlens_q, seqused_k)
    check_paged(q, k, v, page_table, rows)
    check(seqused_k.shape == (rows,), "seqused_k must have shape (batch_size,)")
    check(q.shape[-1] % 8 == 0 and 8 <= q.shape[-1] <= 128, "head_dim must be between 8 and 128 and divisible by 8")
    queries, lengths = rows_of(q, cu_seqlens_q, max_seqlen_q), seqused_k.tolist()
    check(max(lengths) <= max_seqlen_k, "max_seqlen_k")
    whole_pages = k.shape[1] == 128  # only then are pages loaded by TMA
    result = attend(queries, k, v, page_table, lengths, softmax_scale, causal, window_size, softcap, whole_pages)
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
    check_int32(cu_seq_q, cu_seq_k, seqused_k)
    check_paged(query, key, value, block_table, rows)
    check(key.shape[1] % 256 == 0, "Paged KV cache block size must be divisible by 256")
    check(len(cu_seq_k) == rows + 1 and seqused_k.shape == (rows,), "shape")
    check(out.dtype == query.dtype and out.stride(-1) == 1 and out.shape == query.shape, "out")
    check(cu_seq_k.diff().tolist() == seqused_k.tolist(), "cu_seq_k")
    queries, lengths = rows_of(query, cu_seq_q, max_q), seqused_k.tolist()
    check(max(lengths) <= max_k, "max_k")
    causal = tuple(window_size) == (-1, 0)
    out.copy_(attend(queries, key, value, block_table, lengths, scale, causal, window_size, 0.0))
    return out
