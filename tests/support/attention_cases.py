"""The cases every attention backend must pass, and their answers in double precision.

A case is a list of (query tokens, tokens in the cache afterwards). Unused cache slots are NaN; table columns past a
row's end are stale: they name blocks of other rows.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch

from nexusengine.attention.base import AttentionBackend, AttentionMeta, AttentionSpec

HEADS = {"multi-head": (4, 4), "grouped": (8, 2), "one KV head": (6, 1)}
BATCHES: dict[str, list[tuple[int, int]]] = {
    "one decode": [(1, 40)],
    "first token": [(1, 1)],
    "decodes around block edges": [(1, n) for n in (15, 16, 17, 31, 32, 33)],
    "a whole prompt": [(37, 37)],
    "a chunk after a prefix": [(16, 48), (5, 21)],
    "mixed": [(1, 90), (1, 16), (1, 1), (20, 20), (33, 64), (2, 3)],
}
TOLERANCE = {torch.float32: 2e-5, torch.float16: 4e-3, torch.bfloat16: 3e-2}


def oracle(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    scale: float,
    window: int | None = None,
    soft_cap: float | None = None,
) -> torch.Tensor:
    """q [Q, H, D], k and v [N, H_kv, D] of one sequence, in double precision; window and soft_cap as in the spec."""
    groups = q.shape[1] // k.shape[1]
    k, v = (t.double().repeat_interleave(groups, dim=1) for t in (k, v))
    scores = torch.einsum("qhd,nhd->hqn", q.double(), k) * scale
    if soft_cap:
        scores = soft_cap * (scores / soft_cap).tanh()
    places = torch.arange(q.shape[0])[:, None] + k.shape[0] - q.shape[0]
    keys = torch.arange(k.shape[0])[None]
    hidden = keys > places
    if window:
        hidden = hidden | (keys <= places - window)
    return torch.einsum("hqn,nhd->qhd", scores.masked_fill(hidden, -math.inf).softmax(-1), v)


@dataclass(frozen=True, slots=True)
class Case:
    """A batch ready to run: the cache holds what came before; new_k and new_v are this step's, to be stored first."""

    spec: AttentionSpec
    meta: AttentionMeta
    q: torch.Tensor
    new_k: torch.Tensor
    new_v: torch.Tensor
    k_cache: torch.Tensor
    v_cache: torch.Tensor
    expected: torch.Tensor


def make_case(spec: AttentionSpec, rows: list[tuple[int, int]], seed: int = 0) -> Case:
    """Rows with one query must come first."""
    random = torch.Generator().manual_seed(seed)
    heads, kv_heads, dim, size = spec.num_heads, spec.num_kv_heads, spec.head_dim, spec.block_size

    def normal(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, generator=random).to(spec.dtype)

    def kept(x: torch.Tensor) -> torch.Tensor:
        """With a cache of 8 bits, numbers that have as many: that storing rounds is tested elsewhere."""
        return x if spec.kv_dtype is None else x.to(spec.kv_dtype).to(spec.dtype)

    needed = [-(-n // size) for _, n in rows]
    shape = (2, sum(needed) + 5, size, kv_heads, dim)
    cache = torch.full(shape, torch.nan, dtype=spec.dtype).to(spec.kv_dtype or spec.dtype)
    blocks = torch.randperm(shape[1] - 1, generator=random)[: sum(needed)] + 1
    table = blocks[torch.randint(len(blocks), (len(rows), max(needed) + 2), generator=random)].int()
    queries, new_k, new_v, slots, expected = [], [], [], [], []
    at = 0
    for r, (q, n) in enumerate(rows):
        table[r, : needed[r]] = blocks[at : at + needed[r]]
        at += needed[r]
        k, v = kept(normal(n, kv_heads, dim)), kept(normal(n, kv_heads, dim))
        places = table[r, torch.arange(n) // size].long() * size + torch.arange(n) % size
        cache[0].view(-1, kv_heads, dim)[places[: n - q]] = k[: n - q].to(cache.dtype)
        cache[1].view(-1, kv_heads, dim)[places[: n - q]] = v[: n - q].to(cache.dtype)
        queries.append(kept(normal(q, heads, dim)))
        expected.append(oracle(queries[-1], k, v, spec.scale, spec.window, spec.soft_cap))
        new_k.append(k[n - q :])
        new_v.append(v[n - q :])
        slots.append(places[n - q :])
    counts = torch.tensor([q for q, _ in rows])
    device = spec.device
    meta = AttentionMeta(
        block_table=table.to(device),
        seq_lens=torch.tensor([n for _, n in rows], dtype=torch.int32, device=device),
        cu_seqlens_q=torch.cat([torch.zeros(1), counts.cumsum(0)]).int().to(device),
        slot_mapping=torch.cat(slots).to(device),
        seq_lens_host=[n for _, n in rows],
        query_lens_host=counts.tolist(),
        num_decodes=int((counts == 1).sum()),
        max_seq_len=max(n for _, n in rows),
        max_query_len=int(counts.max()),
    )
    rows_q, rows_k, rows_v = (torch.cat(parts).to(device) for parts in (queries, new_k, new_v))
    return Case(spec, meta, rows_q, rows_k, rows_v, cache[0].to(device), cache[1].to(device), torch.cat(expected))


def run_case(backend: AttentionBackend, case: Case) -> torch.Tensor:
    """Store, then attend; `[T, H, D]`, NaN where nothing was written."""
    backend.plan(case.meta)
    backend.store(case.new_k, case.new_v, case.k_cache, case.v_cache, case.meta)
    out = torch.full_like(case.q, torch.nan)
    backend.run(case.q, case.k_cache, case.v_cache, case.meta, out)
    return out


def difference(backend: AttentionBackend, case: Case) -> float:
    return float((run_case(backend, case).cpu().double() - case.expected).abs().max())
