"""Attention of queries of any length: a program computes a tile of one row's queries over all keys they see."""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from nexusengine.triton_kernels import launch as launching
from nexusengine.triton_kernels.attention import Shape, attend, constants, padded, prefill_tile, score_scale


@triton.jit(
    do_not_specialize=["table_stride", "first_row", "num_rows"],
    do_not_specialize_on_alignment=["table", "lengths", "starts"],
)
def _prefill_kernel(
    q, k_cache, v_cache, table, lengths, starts, out, scale, first_row, num_rows, q_stride, out_stride, table_stride,
    block_stride, slot_stride, head_stride,
    GROUP: tl.constexpr, DIM: tl.constexpr, DIM_PADDED: tl.constexpr, BLOCK: tl.constexpr, ROWS: tl.constexpr,
    KEYS: tl.constexpr, WINDOW: tl.constexpr, CAP: tl.constexpr, EXACT: tl.constexpr,
):  # fmt: skip
    """A program: a tile of one row's queries, one KV head.

    Tiles of row r begin at starts[r] // TOKENS + r - first, which leaves room for every row's last tile; programs in
    the gaps end at once.
    """
    TOKENS: tl.constexpr = ROWS // GROUP
    tile, kv_head = tl.program_id(0), tl.program_id(1)
    origin = tl.load(starts + first_row)
    low = first_row
    high = num_rows
    while low + 1 < high:  # the last row whose first tile is not past this one
        middle = (low + high) // 2
        begins = (tl.load(starts + middle) - origin) // TOKENS + middle - first_row
        if begins <= tile:
            low = middle
        else:
            high = middle
    row = low
    start = tl.load(starts + row)
    count = tl.load(starts + row + 1) - start
    length = tl.load(lengths + row)
    token = (tile - ((start - origin) // TOKENS + row - first_row)) * TOKENS
    if token >= count:
        return
    rows, dims = tl.arange(0, ROWS), tl.arange(0, DIM_PADDED)
    tokens = token + rows // GROUP
    heads = kv_head * GROUP + rows % GROUP
    real = (rows < TOKENS * GROUP) & (tokens < count)
    used = real[:, None] & (dims < DIM)[None, :]
    places = (start + tokens).to(tl.int64)
    queries = tl.load(q + places[:, None] * q_stride + heads[:, None] * DIM + dims[None, :], mask=used, other=0.0)
    last = length - count + tokens
    end = tl.minimum(length - count + token + TOKENS, length)
    first = 0
    if WINDOW > 0:
        first = tl.maximum(length - count + token - WINDOW + 1, 0) // KEYS * KEYS
    values, weights, _ = attend(
        queries, k_cache, v_cache, table + row.to(tl.int64) * table_stride, first, end, last, kv_head, scale,
        block_stride, slot_stride, head_stride, DIM, DIM_PADDED, BLOCK, ROWS, KEYS, WINDOW, CAP, EXACT,
    )  # fmt: skip
    weights = tl.where(weights == 0.0, 1.0, weights)
    target = out + places[:, None] * out_stride + heads[:, None] * DIM + dims[None, :]
    tl.store(target, (values / weights[:, None]).to(out.dtype.element_ty), mask=used)


def prefill(
    q: torch.Tensor,
    k_cache: torch.Tensor,
    v_cache: torch.Tensor,
    block_table: torch.Tensor,
    seq_lens: torch.Tensor,
    cu_seqlens_q: torch.Tensor,
    out: torch.Tensor,
    shape: Shape,
    first_row: int,
    capability: tuple[int, int],
) -> None:
    """Attention of rows with any number of queries, which are the last tokens of their sequences.

    Args:
        q: `[T, H, D]` of the whole batch, as the tables are.
        k_cache: as for decodes.
        v_cache: as for decodes.
        block_table: i4 `[R, B]`.
        seq_lens: i4 `[R]`.
        cu_seqlens_q: i4 `[R + 1]`, where each row's queries begin.
        out: as q.
        shape: of the model.
        first_row: the rows from here on are computed; those before have one token each.
        capability: of the device.
    """
    tile = prefill_tile(shape, q.element_size(), capability)
    rows = len(seq_lens)
    tiles = (len(q) - first_row) // (tile.rows // shape.group) + rows - first_row
    launching.launch(
        _prefill_kernel,
        (tiles, shape.num_kv_heads),
        q, k_cache, v_cache, block_table, seq_lens, cu_seqlens_q, out, score_scale(shape), first_row, rows,
        q.stride(0), out.stride(0), block_table.stride(0), *k_cache.stride()[:3],
        **constants(shape, tile, q), DIM=shape.head_dim, DIM_PADDED=padded(shape.head_dim), WINDOW=shape.window,
    )  # fmt: skip
