"""Gather the cached K and V, then torch's scaled_dot_product_attention. Works on every device; the reference.

Rows that compute one token are done in groups of similar length, padded to the longest; longer queries row by row, in
pieces, so that no piece looks at keys past its own end. What lies in unused cache slots cannot leak: chunks gather
exactly their tokens, and padding is overwritten with zeros, since a mask alone would let NaN through.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
import torch
import torch.nn.functional as F

from nexusengine.attention.base import FP8, AttentionCaps, AttentionMeta, AttentionSpec, as_stored

_PIECE_TOKENS = 256
_GROUP_TOKENS = 32_768
"""Most KV tokens gathered for a group, padding included: bounds the memory of a step."""


@dataclass(frozen=True, slots=True)
class _Group:
    """One-token rows of similar length; equal lengths need neither padding nor mask.

    Attributes:
        rows: i8 `[R]`.
        blocks: i8 `[R * B]`.
        padding: i8, tokens of the gathered `[R * B * block_size]` to clear.
        mask: `[R, 1, 1, longest]`, 0 or -inf.
    """

    rows: torch.Tensor
    blocks: torch.Tensor
    longest: int
    padding: torch.Tensor | None
    mask: torch.Tensor | None


@dataclass(frozen=True, slots=True)
class _Chunk:
    """A row of several tokens.

    Attributes:
        pieces: (first query, past the last one, keys they see, mask bool `[queries, keys]`), queries counted in the
            batch.
    """

    blocks: torch.Tensor
    pieces: list[tuple[int, int, int, torch.Tensor]]


class SdpaBackend:
    name = "sdpa"

    @classmethod
    def caps(cls) -> AttentionCaps:
        sizes = (16, *(size for size in range(1, 1025) if size != 16))
        return AttentionCaps(sizes, (torch.float32, torch.float16, torch.bfloat16), fp8_cache=True)

    @classmethod
    def probe(cls) -> tuple[bool, str]:
        return True, "part of torch"

    @classmethod
    def supports(cls, spec: AttentionSpec) -> tuple[bool, str]:
        if spec.dtype not in cls.caps().dtypes:
            return False, f"does not compute in {spec.dtype}"
        if spec.kv_dtype == FP8 and spec.device.type != "cpu":
            return False, "gathers K and V, which saves nothing with 8 bits"
        return True, "any shape"

    def __init__(self, spec: AttentionSpec) -> None:
        self._spec = spec
        self._decodes: list[_Group] = []
        self._chunks: list[_Chunk] = []

    def plan(self, meta: AttentionMeta) -> None:
        size, device, first = self._spec.block_size, self._spec.device, meta.num_decodes
        self._decodes = [self._group(rows, meta) for rows in groups_of_like_lengths(meta.seq_lens_host[:first])]
        self._chunks, start = [], first
        for row in range(first, len(meta.seq_lens_host)):
            total, end = meta.seq_lens_host[row], start + meta.query_lens_host[row]
            pieces = []
            for begin in range(start, end, _PIECE_TOKENS):
                past = min(begin + _PIECE_TOKENS, end)
                keys = total - (end - past)
                pieces.append((begin, past, keys, _causal(past - begin, keys, device)))
            self._chunks.append(_Chunk(meta.block_table[row, : -(-total // size)].long(), pieces))
            start = end

    def store(
        self, k: torch.Tensor, v: torch.Tensor, k_cache: torch.Tensor, v_cache: torch.Tensor, meta: AttentionMeta
    ) -> None:
        slots = meta.slot_mapping.clamp_min(0)  # skipped tokens land in the null block, which nobody reads
        k_cache.view(-1, *k.shape[1:])[slots] = as_stored(k, k_cache)
        v_cache.view(-1, *v.shape[1:])[slots] = as_stored(v, v_cache)

    def run(
        self,
        q: torch.Tensor,
        k_cache: torch.Tensor,
        v_cache: torch.Tensor,
        meta: AttentionMeta,
        out: torch.Tensor,
    ) -> None:
        for group in self._decodes:
            out[group.rows] = self._run_group(q[group.rows], k_cache, v_cache, group)
        for chunk in self._chunks:
            self._run_chunk(q, k_cache, v_cache, chunk, out)

    def _run_group(self, q: torch.Tensor, k_cache: torch.Tensor, v_cache: torch.Tensor, group: _Group) -> torch.Tensor:
        """q `[R, H, D]` -> `[R, H, D]`. Heads that share K and V are packed into the query axis."""
        rows, (heads, kv_heads, dim) = len(q), self._heads
        keys, values = (
            _gather(cache, q.dtype, group.blocks, group.padding)
            .view(rows, -1, kv_heads, dim)[:, : group.longest]
            .transpose(1, 2)
            for cache in (k_cache, v_cache)
        )
        packed = q.view(rows, kv_heads, heads // kv_heads, dim)
        mixed = F.scaled_dot_product_attention(packed, keys, values, attn_mask=group.mask, scale=self._spec.scale)
        return mixed.reshape(rows, heads, dim)

    def _run_chunk(
        self, q: torch.Tensor, k_cache: torch.Tensor, v_cache: torch.Tensor, chunk: _Chunk, out: torch.Tensor
    ) -> None:
        """Query heads `[H_kv, H / H_kv, queries, D]` against K and V repeated by a view."""
        heads, kv_heads, dim = self._heads
        shared = heads // kv_heads
        keys, values = (_gather(cache, q.dtype, chunk.blocks).transpose(0, 1)[:, None] for cache in (k_cache, v_cache))
        for begin, past, count, mask in chunk.pieces:
            mixed = F.scaled_dot_product_attention(
                q[begin:past].view(-1, kv_heads, shared, dim).permute(1, 2, 0, 3),
                keys[:, :, :count].expand(-1, shared, -1, -1),
                values[:, :, :count].expand(-1, shared, -1, -1),
                attn_mask=mask,
                scale=self._spec.scale,
            )
            out[begin:past] = mixed.permute(2, 0, 1, 3).reshape(-1, heads, dim)

    @property
    def _heads(self) -> tuple[int, int, int]:
        return self._spec.num_heads, self._spec.num_kv_heads, self._spec.head_dim

    def _group(self, rows: list[int], meta: AttentionMeta) -> _Group:
        size, device = self._spec.block_size, self._spec.device
        lengths = np.array([meta.seq_lens_host[row] for row in rows])
        longest = int(lengths.max())
        index = torch.tensor(rows, device=device)
        blocks = meta.block_table[:, : -(-longest // size)].index_select(0, index).long()
        if (lengths == longest).all():
            return _Group(index, blocks.flatten(), longest, None, None)
        beyond = np.arange(blocks.shape[1] * size) >= lengths[:, None]
        mask = np.where(beyond[:, None, None, :longest], -np.inf, 0.0)
        return _Group(
            index,
            blocks.flatten(),
            longest,
            torch.from_numpy(np.flatnonzero(beyond)).to(device),
            torch.from_numpy(mask).to(device, self._spec.dtype),
        )


def _gather(
    cache: torch.Tensor, dtype: torch.dtype, blocks: torch.Tensor, padding: torch.Tensor | None = None
) -> torch.Tensor:
    """cache `[num_blocks, block_size, H_kv, D]` -> tokens of `blocks`, `[N, H_kv, D]`, in a type, padding cleared."""
    tokens = cache.index_select(0, blocks).flatten(0, 1).to(dtype)
    return tokens if padding is None else tokens.index_fill_(0, padding, 0.0)


def groups_of_like_lengths(lengths: list[int]) -> Iterator[list[int]]:
    """Indices grouped so that padding to the longest of a group wastes little."""
    group: list[int] = []
    for row in sorted(range(len(lengths)), key=lengths.__getitem__):
        length = lengths[row]
        if group and (length > 1.25 * lengths[group[0]] + 32 or (len(group) + 1) * length > _GROUP_TOKENS):
            yield group
            group = []
        group.append(row)
    if group:
        yield group


def _causal(queries: int, keys: int, device: torch.device) -> torch.Tensor:
    """bool [queries, keys], True where a query may look: bottom-right aligned."""
    return torch.ones(queries, keys, dtype=torch.bool, device=device).tril(keys - queries)
