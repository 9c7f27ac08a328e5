"""The protocol of attention backends: one call for prefill, chunk, prefix hit, mixed batch and decode."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

import torch

FP8 = torch.float8_e4m3fn
FP8_LARGEST = 448.0


def as_stored(x: torch.Tensor, cache: torch.Tensor) -> torch.Tensor:
    """K or V in the type of the cache. Some of torch's conversions to FP8 make NaN of what is too large."""
    return x if cache.dtype != FP8 else x.clamp(-FP8_LARGEST, FP8_LARGEST).to(FP8)


@dataclass(frozen=True, slots=True)
class AttentionSpec:
    """The shape a backend is asked for.

    Attributes:
        block_size: tokens a KV block.
        scale: of scores.
        window: most recent keys a query sees, itself included.
        soft_cap: scores become cap * tanh(score / cap).
        kv_dtype: of the cache, FP8 or None for dtype; numbers beyond FP8's largest become that.
    """

    num_heads: int
    num_kv_heads: int
    head_dim: int
    dtype: torch.dtype
    device: torch.device
    block_size: int
    scale: float
    window: int | None = None
    soft_cap: float | None = None
    kv_dtype: torch.dtype | None = None


@dataclass(frozen=True, slots=True)
class AttentionCaps:
    """Capabilities of a backend.

    Attributes:
        block_sizes: sizes it can use, preferred first.
        dtypes: it computes in.
        graphs: it can run in a CUDA graph, or have its calls recorded and replayed (layers.ops.Ops.step).
        modifiers: it knows windows and soft caps.
        plain_cache: K and V lie in the cache as they are, so that others may store them (`AttentionBackend.store` says
            how).
        fp8_cache: K and V may be 8-bit floats.
    """

    block_sizes: tuple[int, ...]
    dtypes: tuple[torch.dtype, ...]
    graphs: bool = False
    modifiers: bool = False
    plain_cache: bool = True
    fp8_cache: bool = False


@dataclass(frozen=True, slots=True)
class AttentionMeta:
    """A step's batch as attention sees it. R rows, T tokens; rows with one query token come first.

    block_table  i4 [R, B] on the device; columns past a row's length are 0 (the null block) or stale
    seq_lens     i4 [R]    tokens in the cache once this step's K and V are stored
    cu_seqlens_q i4 [R+1]  row r's queries are q[cu[r]:cu[r+1]]; they are the last tokens of its sequence
    slot_mapping i8 [T]    cache slot (block * block_size + offset) of each token's K and V; -1 is skipped
    The *_host fields are the same numbers as Python ints, so that a backend can loop over rows without a device sync.
    """

    block_table: torch.Tensor
    seq_lens: torch.Tensor
    cu_seqlens_q: torch.Tensor
    slot_mapping: torch.Tensor
    seq_lens_host: list[int]
    query_lens_host: list[int]
    num_decodes: int
    max_seq_len: int
    max_query_len: int


class AttentionBackend(Protocol):
    """Causal attention, bottom-right aligned: query i of a row with q queries sees keys 0 .. seq_len - q + i."""

    name: str

    @classmethod
    def caps(cls) -> AttentionCaps: ...

    @classmethod
    def probe(cls) -> tuple[bool, str]:
        """(available, why or why not). Never raises."""
        ...

    @classmethod
    def supports(cls, spec: AttentionSpec) -> tuple[bool, str]: ...

    def __init__(self, spec: AttentionSpec) -> None: ...

    def plan(self, meta: AttentionMeta) -> None:
        """Once a step, before the first layer."""
        ...

    def store(
        self, k: torch.Tensor, v: torch.Tensor, k_cache: torch.Tensor, v_cache: torch.Tensor, meta: AttentionMeta
    ) -> None:
        """Write k, v `[T, H_kv, D]` into k_cache, v_cache `[num_blocks, block_size, H_kv, D]` at meta.slot_mapping."""
        ...

    def run(
        self,
        q: torch.Tensor,
        k_cache: torch.Tensor,
        v_cache: torch.Tensor,
        meta: AttentionMeta,
        out: torch.Tensor,
    ) -> None:
        """q, out `[T, H, D]`; caches `[num_blocks, block_size, H_kv, D]` of one layer, this step's K and V stored."""
        ...
