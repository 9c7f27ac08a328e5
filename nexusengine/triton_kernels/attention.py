"""Attention over a paged KV cache: decodes split over their keys, and queries of any length.

Query heads that share a KV head are packed into the rows of one tile. Softmax is online (Milakov and Gimelshein, arXiv
1805.02867; FlashAttention-2, arXiv 2307.08691) and in base 2; decodes are split as in Flash-Decoding. What a row comes
to depends on its own length and on the sizes of tiles and splits, never on the rows beside it. Keys past its end are
never read.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import triton
import triton.language as tl

from nexusengine.triton_kernels import launch as launching

_LOG2_E = 1.4426950408889634
_INTERPRETED = tl.constexpr(launching.interpreted())
_MERGED_SPLITS = 16


@dataclass(frozen=True, slots=True)
class Shape:
    """What never changes from step to step. window: most recent keys a query sees, itself included; 0 for all.
    soft_cap: scores become cap * tanh(score / cap); 0 for none."""

    num_heads: int
    num_kv_heads: int
    head_dim: int
    block_size: int
    scale: float
    window: int = 0
    soft_cap: float = 0.0

    @property
    def group(self) -> int:
        return self.num_heads // self.num_kv_heads


@dataclass(frozen=True, slots=True)
class Tile:
    """rows of packed queries, keys looked at together, warps of a program and stages of its pipeline."""

    rows: int
    keys: int
    warps: int
    stages: int


def decode_tile(shape: Shape, itemsize: int, capability: tuple[int, int]) -> Tile:
    return _tile(_padded(shape.group), 4, shape, itemsize, capability)


def prefill_tile(shape: Shape, itemsize: int, capability: tuple[int, int]) -> Tile:
    row_bytes = _padded(shape.head_dim) * itemsize
    if capability >= (8, 0):
        rows = 128 if row_bytes <= 256 else 64 if row_bytes <= 512 else 32
    else:
        rows = 64 if row_bytes <= 256 else 32
    return _tile(max(rows, _padded(shape.group)), 8 if rows == 128 else 4, shape, itemsize, capability)


def _tile(rows: int, warps: int, shape: Shape, itemsize: int, capability: tuple[int, int]) -> Tile:
    """32 KiB of K and V at a time; as many stages, up to three, as leave two fifths of the shared memory to the rest
    (Q, P, changes of layout). That it fits is what the cross-compilation tests say."""
    dim = _padded(shape.head_dim)
    keys = max(16, min(64, 16_384 // (dim * itemsize)))
    ahead = launching.shared_bytes(capability) * 3 // 5 // (2 * keys * dim * itemsize)
    return Tile(rows, keys, warps, min(1 + ahead, 3) if capability >= (8, 0) else 1)


def _padded(number: int, least: int = 16) -> int:
    return max(least, int(triton.next_power_of_2(number)))


@triton.jit
def _dot(a, b, c, EXACT: tl.constexpr):
    """c + a b in float32. The interpreter multiplies bfloat16 wrongly, so that it is given float32."""
    if _INTERPRETED:
        return tl.dot(a.to(tl.float32), b.to(tl.float32), c)
    if EXACT:
        return tl.dot(a, b, c, input_precision="ieee")
    return tl.dot(a, b, c)


@triton.jit
def _scores(q, k, scale, CAP: tl.constexpr, ROWS: tl.constexpr, KEYS: tl.constexpr, EXACT: tl.constexpr):
    """Scores in base 2. scale: with log2(e) in it, unless there is a cap."""
    s = _dot(q, k, tl.zeros([ROWS, KEYS], tl.float32), EXACT) * scale
    if CAP > 0.0:
        # tanh(x) = 1 - 2 / (exp(2 x) + 1)
        s = CAP * 1.4426950408889634 * (1.0 - 2.0 / (tl.exp2(s * (2.0 * 1.4426950408889634 / CAP)) + 1.0))
    return s


@triton.jit
def _attend(
    q,
    k_cache,
    v_cache,
    table,
    first,
    end,
    last,
    kv_head,
    scale,
    block_stride,
    slot_stride,
    head_stride,
    DIM: tl.constexpr,
    DIM_PADDED: tl.constexpr,
    BLOCK: tl.constexpr,
    ROWS: tl.constexpr,
    KEYS: tl.constexpr,
    WINDOW: tl.constexpr,
    CAP: tl.constexpr,
    EXACT: tl.constexpr,
):
    """q [ROWS, DIM_PADDED] over the keys first .. end - 1 of a row; last [ROWS]: the last key each query sees.
    Returns (sums of weighted values, sums of weights, largest scores); weights are relative to the largest score."""
    dims = tl.arange(0, DIM_PADDED)
    within = dims < DIM
    top = tl.full([ROWS], float("-inf"), tl.float32)
    weights = tl.zeros([ROWS], tl.float32)
    values = tl.zeros([ROWS, DIM_PADDED], tl.float32)
    for start in tl.range(first, end, KEYS):
        keys = start + tl.arange(0, KEYS)
        there = keys < end
        blocks = tl.load(table + keys // BLOCK, mask=there, other=0).to(tl.int64)
        places = blocks * block_stride + (keys % BLOCK).to(tl.int64) * slot_stride + kv_head * head_stride
        k = tl.load(k_cache + places[None, :] + dims[:, None], mask=there[None, :] & within[:, None], other=0.0)
        k = k.to(q.dtype)
        s = _scores(q, k, scale, CAP, ROWS, KEYS, EXACT)
        seen = there[None, :] & (keys[None, :] <= last[:, None])
        if WINDOW > 0:
            seen = seen & (keys[None, :] > last[:, None] - WINDOW)
        s = tl.where(seen, s, float("-inf"))
        higher = tl.maximum(top, tl.max(s, 1))
        level = tl.where(higher == float("-inf"), 0.0, higher)
        p = tl.exp2(s - level[:, None])
        shrink = tl.exp2(top - level)
        weights = weights * shrink + tl.sum(p, 1)
        v = tl.load(v_cache + places[:, None] + dims[None, :], mask=there[:, None] & within[None, :], other=0.0)
        v = v.to(q.dtype)
        values = _dot(p.to(v.dtype), v, values * shrink[:, None], EXACT)
        top = higher
    return values, weights, top


@triton.jit(do_not_specialize=["table_stride", "num_splits"], do_not_specialize_on_alignment=["table", "lengths"])
def _decode_kernel(
    q,
    k_cache,
    v_cache,
    table,
    lengths,
    out,
    partial,
    levels,
    scale,
    q_stride,
    out_stride,
    table_stride,
    block_stride,
    slot_stride,
    head_stride,
    num_heads,
    num_splits,
    split_tokens,
    GROUP: tl.constexpr,
    DIM: tl.constexpr,
    DIM_PADDED: tl.constexpr,
    BLOCK: tl.constexpr,
    ROWS: tl.constexpr,
    KEYS: tl.constexpr,
    WINDOW: tl.constexpr,
    CAP: tl.constexpr,
    SPLIT: tl.constexpr,
    EXACT: tl.constexpr,
):
    """A program: one row, one KV head, one split of the row's keys."""
    row, kv_head, split = tl.program_id(0), tl.program_id(1), tl.program_id(2)
    length = tl.load(lengths + row)
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
    values, weights, top = _attend(
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
    partial,
    levels,
    lengths,
    out,
    out_stride,
    num_heads,
    num_splits,
    split_tokens,
    DIM: tl.constexpr,
    DIM_PADDED: tl.constexpr,
    WINDOW: tl.constexpr,
    SPLITS: tl.constexpr,
):
    """A program: one row, one head; its splits in order."""
    row, head = tl.program_id(0), tl.program_id(1)
    length = tl.load(lengths + row)
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


@triton.jit(
    do_not_specialize=["table_stride", "first_row", "num_rows"],
    do_not_specialize_on_alignment=["table", "lengths", "starts"],
)
def _prefill_kernel(
    q,
    k_cache,
    v_cache,
    table,
    lengths,
    starts,
    out,
    scale,
    first_row,
    num_rows,
    q_stride,
    out_stride,
    table_stride,
    block_stride,
    slot_stride,
    head_stride,
    GROUP: tl.constexpr,
    DIM: tl.constexpr,
    DIM_PADDED: tl.constexpr,
    BLOCK: tl.constexpr,
    ROWS: tl.constexpr,
    KEYS: tl.constexpr,
    WINDOW: tl.constexpr,
    CAP: tl.constexpr,
    EXACT: tl.constexpr,
):
    """A program: a tile of one row's queries, one KV head. Tiles of row r begin at starts[r] // TOKENS + r - first,
    which leaves room for every row's last tile; programs in the gaps end at once."""
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
    values, weights, _ = _attend(
        queries, k_cache, v_cache, table + row.to(tl.int64) * table_stride, first, end, last, kv_head, scale,
        block_stride, slot_stride, head_stride, DIM, DIM_PADDED, BLOCK, ROWS, KEYS, WINDOW, CAP, EXACT,
    )  # fmt: skip
    weights = tl.where(weights == 0.0, 1.0, weights)
    target = out + places[:, None] * out_stride + heads[:, None] * DIM + dims[None, :]
    tl.store(target, (values / weights[:, None]).to(out.dtype.element_ty), mask=used)


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
) -> None:
    """q, out `[R, H, D]`, heads side by side; caches `[num_blocks, block_size, H_kv, D]` of equal strides, of q's type
    or float8_e4m3fn, whose numbers q's type has too; block_table i4 `[R, B]`, seq_lens i4 `[R]`, at most num_splits *
    split_tokens. A row of length 0 gives zeros."""
    rows, tile = len(q), decode_tile(shape, q.element_size(), capability)
    partial, levels = out, out
    if num_splits > 1:
        partial = q.new_empty(rows, shape.num_heads, num_splits, shape.head_dim, dtype=torch.float32)
        levels = q.new_empty(rows, shape.num_heads, num_splits, dtype=torch.float32)
    common = {"DIM": shape.head_dim, "DIM_PADDED": _padded(shape.head_dim), "WINDOW": shape.window}
    launching.launch(
        _decode_kernel,
        (rows, shape.num_kv_heads, num_splits),
        q, k_cache, v_cache, block_table, seq_lens, out, partial, levels, _scale(shape), q.stride(0), out.stride(0),
        block_table.stride(0), *k_cache.stride()[:3], shape.num_heads, num_splits, split_tokens,
        **_constants(shape, tile, q), **common, SPLIT=num_splits > 1,
    )  # fmt: skip
    if num_splits > 1:
        launching.launch(
            _merge_kernel,
            (rows, shape.num_heads),
            partial, levels, seq_lens, out, out.stride(0), shape.num_heads, num_splits, split_tokens,
            **common, SPLITS=_MERGED_SPLITS, num_warps=4, num_stages=1,
        )  # fmt: skip


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
    """The rows from first_row on, each with any number of queries, which are its sequence's last tokens. q, out
    `[T, H, D]` and the tables are those of the whole batch; the rows before have one token each."""
    tile = prefill_tile(shape, q.element_size(), capability)
    rows = len(seq_lens)
    tiles = (len(q) - first_row) // (tile.rows // shape.group) + rows - first_row
    launching.launch(
        _prefill_kernel,
        (tiles, shape.num_kv_heads),
        q, k_cache, v_cache, block_table, seq_lens, cu_seqlens_q, out, _scale(shape), first_row, rows,
        q.stride(0), out.stride(0), block_table.stride(0), *k_cache.stride()[:3],
        **_constants(shape, tile, q), DIM=shape.head_dim, DIM_PADDED=_padded(shape.head_dim), WINDOW=shape.window,
    )  # fmt: skip


def _scale(shape: Shape) -> float:
    return shape.scale if shape.soft_cap else shape.scale * _LOG2_E


def _constants(shape: Shape, tile: Tile, q: torch.Tensor) -> dict[str, object]:
    return {
        "GROUP": shape.group,
        "BLOCK": shape.block_size,
        "ROWS": tile.rows,
        "KEYS": tile.keys,
        "CAP": shape.soft_cap,
        "EXACT": q.dtype == torch.float32,
        "num_warps": tile.warps,
        "num_stages": tile.stages,
    }
