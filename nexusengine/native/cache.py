"""The paged KV cache as the kernels see it."""

from __future__ import annotations

import torch

from nexusengine.native import structs

_KINDS = {torch.float32: structs.F32, torch.bfloat16: structs.BF16, torch.int8: structs.INT8}


def cache_of(k_cache: torch.Tensor, v_cache: torch.Tensor, dim: int) -> structs.Cache:
    """The cache of one layer.

    Args:
        k_cache: `[num_blocks, block_size, H_kv, D]`; int8: `[..., D + 4]`, each row D numbers and their float32 scale.
        v_cache: as k_cache, with equal strides.
        dim: D.
    """
    size = k_cache.element_size()
    block, token, head, _ = k_cache.stride()
    return structs.Cache(
        k_cache.data_ptr(),
        v_cache.data_ptr(),
        block * size,
        token * size,
        head * size,
        _KINDS[k_cache.dtype],
        k_cache.shape[1],
    )
