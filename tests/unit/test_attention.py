"""Every attention backend against plain attention in double precision, over a block table with poisoned slots."""

from __future__ import annotations

import math

import pytest

torch = pytest.importorskip("torch")

from nexusengine.attention.base import AttentionMeta, AttentionSpec  # noqa: E402
from nexusengine.attention.registry import BACKENDS, backend_class, choose  # noqa: E402
from nexusengine.errors import ConfigError  # noqa: E402

HEADS = {"multi-head": (4, 4), "grouped": (8, 2), "one KV head": (6, 1)}
BATCHES: dict[str, list[tuple[int, int]]] = {  # (query tokens, tokens in the cache afterwards)
    "one decode": [(1, 40)],
    "first token": [(1, 1)],
    "decodes around block edges": [(1, n) for n in (15, 16, 17, 31, 32, 33)],
    "a whole prompt": [(37, 37)],
    "a chunk after a prefix": [(16, 48), (5, 21)],
    "mixed": [(1, 90), (1, 16), (1, 1), (20, 20), (33, 64), (2, 3)],
}


def oracle(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, scale: float) -> torch.Tensor:
    """q [Q, H, D], k and v [N, H_kv, D] of one sequence, in double precision."""
    groups = q.shape[1] // k.shape[1]
    k, v = (t.double().repeat_interleave(groups, dim=1) for t in (k, v))
    scores = torch.einsum("qhd,nhd->hqn", q.double(), k) * scale
    ahead = torch.arange(k.shape[0])[None] > torch.arange(q.shape[0])[:, None] + k.shape[0] - q.shape[0]
    return torch.einsum("hqn,nhd->qhd", scores.masked_fill(ahead, -math.inf).softmax(-1), v)


@pytest.mark.parametrize("rows", BATCHES.values(), ids=BATCHES)
@pytest.mark.parametrize("dim", [64, 80, 128])
@pytest.mark.parametrize("heads", HEADS.values(), ids=HEADS)
@pytest.mark.parametrize("block_size", [1, 16])
@pytest.mark.parametrize("name", BACKENDS)
def test_a_backend_computes_attention(
    name: str, block_size: int, heads: tuple[int, int], dim: int, rows: list[tuple[int, int]]
) -> None:
    torch.manual_seed(0)
    spec = AttentionSpec(*heads, dim, torch.float32, torch.device("cpu"), block_size, dim**-0.5)
    cls = backend_class(name)
    available, reason = cls.probe()
    if available:
        available, reason = cls.supports(spec)
    if not available:
        pytest.skip(f"{name}: {reason}")
    needed = [-(-n // block_size) for _, n in rows]
    shape = (sum(needed) + 5, block_size, heads[1], dim)
    k_cache, v_cache = torch.full(shape, torch.nan), torch.full(shape, torch.nan)
    blocks = torch.randperm(shape[0] - 1)[: sum(needed)] + 1
    table = torch.zeros(len(rows), max(needed) + 2, dtype=torch.int32)
    keys, values, queries, slots = [], [], [], []
    at = 0
    for r, (q, n) in enumerate(rows):
        table[r, : needed[r]] = blocks[at : at + needed[r]]
        at += needed[r]
        k, v = torch.randn(n, heads[1], dim), torch.randn(n, heads[1], dim)
        places = table[r, torch.arange(n) // block_size].long() * block_size + torch.arange(n) % block_size
        k_cache.view(-1, heads[1], dim)[places[: n - q]] = k[: n - q]
        v_cache.view(-1, heads[1], dim)[places[: n - q]] = v[: n - q]
        keys.append(k)
        values.append(v)
        slots.append(places[n - q :])
        queries.append(torch.randn(q, heads[0], dim))
    cu = torch.tensor([0, *torch.tensor([q for q, _ in rows]).cumsum(0).tolist()], dtype=torch.int32)
    meta = AttentionMeta(
        block_table=table,
        seq_lens=torch.tensor([n for _, n in rows], dtype=torch.int32),
        cu_seqlens_q=cu,
        slot_mapping=torch.cat(slots),
        seq_lens_host=[n for _, n in rows],
        query_lens_host=[q for q, _ in rows],
        num_decodes=sum(q == 1 for q, _ in rows),
        max_seq_len=max(n for _, n in rows),
        max_query_len=max(q for q, _ in rows),
    )
    backend = cls(spec)
    backend.plan(meta)
    new_k = torch.cat([k[len(k) - q :] for k, (q, _) in zip(keys, rows, strict=True)])
    new_v = torch.cat([v[len(v) - q :] for v, (q, _) in zip(values, rows, strict=True)])
    backend.store(new_k, new_v, k_cache, v_cache, meta)
    q = torch.cat(queries)
    out = torch.full_like(q, torch.nan)
    backend.run(q, k_cache, v_cache, meta, out)
    expected = torch.cat([oracle(*t, spec.scale) for t in zip(queries, keys, values, strict=True)])
    assert (out - expected).abs().max() < 2e-5


def test_a_token_without_a_slot_is_stored_where_nobody_reads() -> None:
    spec = AttentionSpec(2, 2, 8, torch.float32, torch.device("cpu"), 4, 1.0)
    k_cache, v_cache = torch.zeros(3, 4, 2, 8), torch.zeros(3, 4, 2, 8)
    meta = AttentionMeta(
        torch.tensor([[1]], dtype=torch.int32),
        torch.tensor([1]),
        torch.tensor([0, 1]),
        torch.tensor([-1, 6]),
        [1],
        [1],
        1,
        1,
        1,
    )
    backend_class("sdpa")(spec).store(torch.ones(2, 2, 8), torch.ones(2, 2, 8), k_cache, v_cache, meta)
    assert k_cache[1:].sum() == v_cache[1:].sum() == 16


def test_a_backend_that_is_asked_for_and_cannot_run_is_an_error_with_the_reason() -> None:
    spec = AttentionSpec(2, 2, 8, torch.float64, torch.device("cpu"), 1, 1.0)
    with pytest.raises(ConfigError, match="float64"):
        choose(spec, "sdpa")
    with pytest.raises(ConfigError, match=r"unknown.*warp.*sdpa"):
        choose(spec, "warp")
