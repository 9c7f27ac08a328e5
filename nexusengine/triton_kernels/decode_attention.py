"""Attention of decodes: a row's keys are split over programs, as in Flash-Decoding, and the splits merged."""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from nexusengine.triton_kernels import launch as launching
from nexusengine.triton_kernels.attention import Shape, attend, constants, decode_tile, padded, score_scale

_MERGED_SPLITS = 16
MOST_SPLITS = 64


@triton.jit
def _tokens_of_a_split(length, split_tokens, MOST: tl.constexpr):
    """A multiple of split_tokens, so that a row of this length has at most MOST splits."""
    splits = (length + split_tokens - 1) // split_tokens
    return tl.maximum((splits + MOST - 1) // MOST, 1) * split_tokens


@triton.jit(do_not_specialize=["table_stride", "num_splits"], do_not_specialize_on_alignment=["table", "lengths"])
def _decode_kernel(
    q, k_cache, v_cache, table, lengths, out, partial, levels, scale, q_stride, out_stride, table_stride,
    block_stride, slot_stride, head_stride, num_heads, num_splits, split_tokens,
    GROUP: tl.constexpr, DIM: tl.constexpr, DIM_PADDED: tl.constexpr, BLOCK: tl.constexpr, ROWS: tl.constexpr,
    KEYS: tl.constexpr, WINDOW: tl.constexpr, CAP: tl.constexpr, SPLIT: tl.constexpr, EXACT: tl.constexpr,
    MOST: tl.constexpr,
):  # fmt: skip
    """A program: one row, one KV head, one split of the row's keys."""
    row, kv_head, split = tl.program_id(0), tl.program_id(1), tl.program_id(2)
    length = tl.load(lengths + row)
    split_tokens = _tokens_of_a_split(length, split_tokens, MOST)
    first = split * split_tokens
    if SPLIT:
        if first >= length:
            return
        end = tl.minimum(first + split_tokens, length)
    else:
        end = length
    if WINDOW > 0:
        oldest = tl.maximum(length - WINDOW, 0)
        if SPLIT:  # noqa: SIM102  one of the two is decided by the compiler
            if end <= oldest:
                return
        first = tl.maximum(first, oldest // KEYS * KEYS)
    heads, dims = tl.arange(0, ROWS), tl.arange(0, DIM_PADDED)
    used = (heads < GROUP)[:, None] & (dims < DIM)[None, :]
    head = kv_head * GROUP + heads
    queries = tl.load(q + row.to(tl.int64) * q_stride + head[:, None] * DIM + dims[None, :], mask=used, other=0.0)
    last = tl.zeros([ROWS], tl.int32) + (length - 1)
    values, weights, top = attend(
        queries, k_cache, v_cache, table + row.to(tl.int64) * table_stride, first, end, last, kv_head, scale,
        block_stride, slot_stride, head_stride, DIM, DIM_PADDED, BLOCK, ROWS, KEYS, WINDOW, CAP, EXACT,
    )  # fmt: skip
    weights = tl.where(weights == 0.0, 1.0, weights)
    values = values / weights[:, None]
    if SPLIT:
        place = (row.to(tl.int64) * num_heads + head) * num_splits + split
        tl.store(partial + place[:, None] * DIM + dims[None, :], values, mask=used)
        tl.store(levels + place, top + tl.log2(weights), mask=heads < GROUP)
    else:
        target = out + row.to(tl.int64) * out_stride + head[:, None] * DIM + dims[None, :]
        tl.store(target, values.to(out.dtype.element_ty), mask=used)


@triton.jit(do_not_specialize=["num_splits"], do_not_specialize_on_alignment=["lengths"])
def _merge_kernel(
    partial, levels, lengths, out, out_stride, num_heads, num_splits, split_tokens,
    DIM: tl.constexpr, DIM_PADDED: tl.constexpr, WINDOW: tl.constexpr, MOST: tl.constexpr, SPLITS: tl.constexpr,
):  # fmt: skip
    """A program: one row, one head; its splits in order."""
    row, head = tl.program_id(0), tl.program_id(1)
    length = tl.load(lengths + row)
    split_tokens = _tokens_of_a_split(length, split_tokens, MOST)
    used = (length + split_tokens - 1) // split_tokens
    oldest = 0
    if WINDOW > 0:
        oldest = tl.maximum(length - WINDOW, 0) // split_tokens
    dims = tl.arange(0, DIM_PADDED)
    within = dims < DIM
    base = (row.to(tl.int64) * num_heads + head) * num_splits
    top = tl.full([1], float("-inf"), tl.float32)
    weights = tl.zeros([1], tl.float32)
    values = tl.zeros([DIM_PADDED], tl.float32)
    for start in range(oldest, used, SPLITS):
        splits = start + tl.arange(0, SPLITS)
        there = splits < used
        level = tl.load(levels + base + splits, mask=there, other=float("-inf"))
        piece = tl.load(
            partial + (base + splits)[:, None] * DIM + dims[None, :], mask=there[:, None] & within[None, :], other=0.0
        )
        higher = tl.maximum(top, tl.max(level, 0))
        weight = tl.exp2(level - higher)
        shrink = tl.exp2(top - higher)
        weights = weights * shrink + tl.sum(weight, 0)
        values = values * shrink + tl.sum(piece * weight[:, None], 0)
        top = higher
    weights = tl.where(weights == 0.0, 1.0, weights)
    target = out + row.to(tl.int64) * out_stride + head * DIM + dims
    tl.store(target, (values / weights).to(out.dtype.element_ty), mask=within)


def decode(
    q: torch.Tensor,
    k_cache: torch.Tensor,
    v_cache: torch.Tensor,
    block_table: torch.Tensor,
    seq_lens: torch.Tensor,
    out: torch.Tensor,
    shape: Shape,
    num_splits: int,
    split_tokens: int,
    capability: tuple[int, int],
    most_splits: int = MOST_SPLITS,
) -> None:
    """Attention of rows with one query each; a row of length 0 gives zeros.

    Args:
        q: `[R, H, D]`, heads side by side.
        k_cache: `[num_blocks, block_size, H_kv, D]`, of q's type or float8_e4m3fn, whose numbers q's type has too.
        v_cache: as k_cache, with equal strides.
        block_table: i4 `[R, B]`.
        seq_lens: i4 `[R]`; at most num_splits * split_tokens, unless num_splits is most_splits.
        out: as q.
        shape: of the model.
        num_splits: into how many parts a row's keys are split.
        split_tokens: keys of each part of a row that has no more than most_splits of these.
        capability: of the device.
        most_splits: of a row; one that is longer has parts of a multiple of split_tokens.
    """
    rows, tile = len(q), decode_tile(shape, q.element_size(), capability)
    partial, levels = out, out
    if num_splits > 1:
        partial = q.new_empty(rows, shape.num_heads, num_splits, shape.head_dim, dtype=torch.float32)
        levels = q.new_empty(rows, shape.num_heads, num_splits, dtype=torch.float32)
    common = {"DIM": shape.head_dim, "DIM_PADDED": padded(shape.head_dim), "WINDOW": shape.window}
    common["MOST"] = most_splits
    launching.launch(
        _decode_kernel,
        (rows, shape.num_kv_heads, num_splits),
        q, k_cache, v_cache, block_table, seq_lens, out, partial, levels, score_scale(shape), q.stride(0),
        out.stride(0), block_table.stride(0), *k_cache.stride()[:3], shape.num_heads, num_splits, split_tokens,
        **constants(shape, tile, q), **common, SPLIT=num_splits > 1,
    )  # fmt: skip
    if num_splits > 1:
        launching.launch(
            _merge_kernel,
            (rows, shape.num_heads),
            partial, levels, seq_lens, out, out.stride(0), shape.num_heads, num_splits, split_tokens,
            **common, SPLITS=_MERGED_SPLITS, num_warps=4, num_stages=1,
        )  # fmt: skip
