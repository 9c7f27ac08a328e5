"""Rotary positions and the store of K and V into the paged cache, in one pass over a step's q, k and v."""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from nexusengine.triton_kernels import launch as launching
from nexusengine.triton_kernels.fp8 import to_fp8

_ELEMENTS = 1024
"""Of a program's tile of heads by half a head."""


@triton.jit
def _as_stored(x, cache):
    """x in the type of the cache: its own, or 8-bit floats."""
    if cache.dtype.element_ty == tl.float8e4nv:
        return to_fp8(x.to(tl.float32))
    return x.to(cache.dtype.element_ty)


@triton.jit(do_not_specialize_on_alignment=["positions", "slots"])
def _rotate_and_store_kernel(
    qkv,
    cos,
    sin,
    positions,
    slots,
    k_cache,
    v_cache,
    row_stride,
    block_stride,
    slot_stride,
    head_stride,
    num_heads,
    num_kv_heads,
    HALF: tl.constexpr,
    HALF_PADDED: tl.constexpr,
    BLOCK: tl.constexpr,
    HEADS: tl.constexpr,
):
    """A program: one token, HEADS of its heads of q, k and v. Pairs are (i, i + D/2); q is rotated where it lies."""
    token = tl.program_id(0).to(tl.int64)
    heads = tl.program_id(1) * HEADS + tl.arange(0, HEADS)
    dims = tl.arange(0, HALF_PADDED)
    within = (heads < num_heads + 2 * num_kv_heads)[:, None] & (dims < HALF)[None, :]
    source = qkv + token * row_stride + heads[:, None] * (2 * HALF) + dims[None, :]
    first = tl.load(source, mask=within, other=0.0).to(tl.float32)
    second = tl.load(source + HALF, mask=within, other=0.0).to(tl.float32)
    at = tl.load(positions + token) * HALF
    c = tl.load(cos + at + dims, mask=dims < HALF, other=0.0).to(tl.float32)[None, :]
    s = tl.load(sin + at + dims, mask=dims < HALF, other=0.0).to(tl.float32)[None, :]
    turned = (heads < num_heads + num_kv_heads)[:, None]
    low = tl.where(turned, first * c - second * s, first).to(qkv.dtype.element_ty)
    high = tl.where(turned, second * c + first * s, second).to(qkv.dtype.element_ty)
    is_query = within & (heads < num_heads)[:, None]
    tl.store(source, low, mask=is_query)
    tl.store(source + HALF, high, mask=is_query)
    slot = tl.load(slots + token)
    place = (slot // BLOCK) * block_stride + (slot % BLOCK) * slot_stride
    stored = within & ((heads * 0 + slot) >= 0)[:, None]  # of a block: the interpreter masks with no lone boolean
    kv_heads = heads - num_heads
    is_key = stored & ((kv_heads >= 0) & (kv_heads < num_kv_heads))[:, None]
    target = k_cache + place + kv_heads[:, None] * head_stride + dims[None, :]
    tl.store(target, _as_stored(low, k_cache), mask=is_key)
    tl.store(target + HALF, _as_stored(high, k_cache), mask=is_key)
    value_heads = kv_heads - num_kv_heads
    is_value = stored & (value_heads >= 0)[:, None]
    target = v_cache + place + value_heads[:, None] * head_stride + dims[None, :]
    tl.store(target, _as_stored(low, v_cache), mask=is_value)
    tl.store(target + HALF, _as_stored(high, v_cache), mask=is_value)


@triton.jit(do_not_specialize_on_alignment=["slots"])
def _store_kernel(
    k,
    v,
    slots,
    k_cache,
    v_cache,
    k_stride,
    v_stride,
    block_stride,
    slot_stride,
    WIDTH: tl.constexpr,
    WIDTH_PADDED: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """A program: one token's K and V, `[H_kv * D]` each."""
    token = tl.program_id(0).to(tl.int64)
    slot = tl.load(slots + token)
    if slot < 0:
        return
    columns = tl.arange(0, WIDTH_PADDED)
    within = columns < WIDTH
    place = (slot // BLOCK) * block_stride + (slot % BLOCK) * slot_stride + columns
    k_own = tl.load(k + token * k_stride + columns, mask=within, other=0.0)
    tl.store(k_cache + place, _as_stored(k_own, k_cache), mask=within)
    v_own = tl.load(v + token * v_stride + columns, mask=within, other=0.0)
    tl.store(v_cache + place, _as_stored(v_own, v_cache), mask=within)


def rotate_and_store(
    qkv: torch.Tensor,
    cos: torch.Tensor,
    sin: torch.Tensor,
    positions: torch.Tensor,
    slots: torch.Tensor,
    k_cache: torch.Tensor,
    v_cache: torch.Tensor,
    heads: tuple[int, int, int],
) -> None:
    """Rotate q in place, and write rotated k and v to the caches.

    Args:
        qkv: `[T, (H + 2 H_kv) * D]`.
        cos: `[P, D / 2]`.
        sin: `[P, D / 2]`.
        positions: i8 `[T]`.
        slots: i8 `[T]`; those of -1 are not written.
        k_cache: `[num_blocks, block_size, H_kv, D]`, which may be float8_e4m3fn.
        v_cache: as k_cache.
        heads: H, H_kv, D.
    """
    count, kv_count, dim = heads
    half = triton.next_power_of_2(dim // 2)
    tile = max(1, min(_ELEMENTS // half, triton.next_power_of_2(count + 2 * kv_count)))
    launching.launch(
        _rotate_and_store_kernel,
        (len(qkv), -(-(count + 2 * kv_count) // tile)),
        qkv, cos, sin, positions, slots, k_cache, v_cache, qkv.stride(0), *k_cache.stride()[:3], count, kv_count,
        HALF=dim // 2, HALF_PADDED=half, BLOCK=k_cache.shape[1], HEADS=tile, num_warps=4, num_stages=1,
    )  # fmt: skip


def store(k: torch.Tensor, v: torch.Tensor, k_cache: torch.Tensor, v_cache: torch.Tensor, slots: torch.Tensor) -> None:
    """Write k, v `[T, H_kv, D]`, heads side by side, into the caches `[num_blocks, block_size, H_kv, D]`.

    Args:
        k: `[T, H_kv, D]`.
        v: `[T, H_kv, D]`.
        k_cache: of the layer.
        v_cache: of the layer.
        slots: i8 `[T]`; those of -1 are not written.
    """
    width = k.shape[1] * k.shape[2]
    launching.launch(
        _store_kernel,
        (len(k),),
        k, v, slots, k_cache, v_cache, k.stride(0), v.stride(0), *k_cache.stride()[:2],
        WIDTH=width, WIDTH_PADDED=triton.next_power_of_2(width), BLOCK=k_cache.shape[1], num_warps=4, num_stages=1,
    )  # fmt: skip
