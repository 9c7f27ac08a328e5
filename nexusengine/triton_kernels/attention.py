"""Attention over a paged KV cache, as both kernels share it: shapes, tiles, and a tile of queries over a row's keys.

Query heads that share a KV head are packed into the rows of one tile. Softmax is online (Milakov and Gimelshein, arXiv
1805.02867; FlashAttention-2, arXiv 2307.08691) and in base 2. What a row comes to depends on its own length and on the
sizes of tiles and splits, never on the rows beside it. Keys past its end are never read.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import triton
import triton.language as tl

from nexusengine.triton_kernels import launch as launching

_LOG2_E = 1.4426950408889634
_INTERPRETED = tl.constexpr(launching.interpreted())


@dataclass(frozen=True, slots=True)
class Shape:
    """The part of a call that never changes from step to step.

    Attributes:
        scale: of scores.
        window: most recent keys a query sees, itself included; 0 for all.
        soft_cap: scores become cap * tanh(score / cap); 0 for none.
    """

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
    """A program's share of the work at a time.

    Attributes:
        rows: packed queries.
        keys: keys looked at together.
        warps: of the program.
        stages: of its pipeline.
    """

    rows: int
    keys: int
    warps: int
    stages: int


def decode_tile(shape: Shape, itemsize: int, capability: tuple[int, int]) -> Tile:
    return _tile(padded(shape.group), 4, shape, itemsize, capability)


def prefill_tile(shape: Shape, itemsize: int, capability: tuple[int, int]) -> Tile:
    row_bytes = padded(shape.head_dim) * itemsize
    if capability >= (8, 0):
        rows = 128 if row_bytes <= 256 else 64 if row_bytes <= 512 else 32
    else:
        rows = 64 if row_bytes <= 256 else 32
    return _tile(max(rows, padded(shape.group)), 8 if rows == 128 else 4, shape, itemsize, capability)


def _tile(rows: int, warps: int, shape: Shape, itemsize: int, capability: tuple[int, int]) -> Tile:
    """32 KiB of K and V at a time, in up to three stages.

    As many as leave two fifths of the shared memory to the rest (Q, P, changes of layout). That it fits is what the
    cross-compilation tests say.
    """
    dim = padded(shape.head_dim)
    keys = max(16, min(64, 16_384 // (dim * itemsize)))
    ahead = launching.shared_bytes(capability) * 3 // 5 // (2 * keys * dim * itemsize)
    return Tile(rows, keys, warps, min(1 + ahead, 3) if capability >= (8, 0) else 1)


def padded(number: int, least: int = 16) -> int:
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
def attend(
    q, k_cache, v_cache, table, first, end, last, kv_head, scale, block_stride, slot_stride, head_stride,
    DIM: tl.constexpr, DIM_PADDED: tl.constexpr, BLOCK: tl.constexpr, ROWS: tl.constexpr, KEYS: tl.constexpr,
    WINDOW: tl.constexpr, CAP: tl.constexpr, EXACT: tl.constexpr,
):  # fmt: skip
    """q [ROWS, DIM_PADDED] over the keys first .. end - 1 of a row; last [ROWS]: the last key each query sees.

    Returns:
        Sums of weighted values, sums of weights, largest scores; weights are relative to the largest score.
    """
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


def score_scale(shape: Shape) -> float:
    return shape.scale if shape.soft_cap else shape.scale * _LOG2_E


def constants(shape: Shape, tile: Tile, q: torch.Tensor) -> dict[str, object]:
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
