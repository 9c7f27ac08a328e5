"""What the stand-ins share: checks of their arguments, and attention itself."""

from __future__ import annotations

import torch

from nexusengine.attention.base import FP8
from tests.support.attention_cases import oracle


def check(fact: bool, message: str) -> None:
    if not fact:
        raise RuntimeError(message)


def attend(
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


def check_paged(
    q: torch.Tensor,
    k_cache: torch.Tensor,
    v_cache: torch.Tensor,
    table: torch.Tensor,
    rows: int,
    dtypes: tuple[torch.dtype, ...] = (torch.float16, torch.bfloat16),
) -> None:
    check(q.dtype in dtypes, "FlashAttention only support fp16 and bf16 data type")
    check(k_cache.dtype == q.dtype == v_cache.dtype, "query, key and value must have the same dtype")
    check(all(t.stride(-1) == 1 for t in (q, k_cache, v_cache)), "Input tensor must have contiguous last dimension")
    check(table.dtype == torch.int32, "block_table must have dtype torch.int32")
    check(table.stride(-1) == 1, "block_table must have contiguous last dimension")
    check(k_cache.shape == v_cache.shape and k_cache.shape[-1] == q.shape[-1], "shape")
    check(table.shape[0] == rows, "block_table must have the shape [batch_size, max_num_blocks_per_seq]")
    check(rows > 0, "batch size must be positive")
    check(q.shape[-1] <= 256, "FlashAttention forward only supports head dimension at most 256")
    check(q.shape[-2] % k_cache.shape[2] == 0, "Number of heads in key/value must divide number of heads in query")


def check_int32(*tensors: torch.Tensor) -> None:
    for tensor in tensors:
        check(tensor.dtype == torch.int32 and tensor.is_contiguous(), "must be contiguous and have dtype int32")


def rows_of(q: torch.Tensor, cu: torch.Tensor, longest: int) -> list[torch.Tensor]:
    counts = cu.diff()
    check(int(cu[0]) == 0 and int(cu[-1]) == len(q) and int(counts.max()) <= longest, "cu_seqlens_q")
    return list(q.split(counts.tolist()))
