"""What is particular to the SDPA backend: groups of decodes, pieces of long queries, stale block tables."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from nexusengine.attention import sdpa
from nexusengine.attention.base import AttentionMeta, AttentionSpec
from tests.support.attention_cases import oracle

SIZE, HEADS, KV_HEADS, DIM = 16, 6, 2, 32


def compare(rows: list[tuple[int, int]], *, dtype: torch.dtype = torch.float32, blocks: int = 400) -> float:
    """Largest difference from the oracle for (queries, tokens) rows. Unused slots are NaN; table columns past a row's
    end are stale: they name blocks of other rows and poisoned ones."""
    torch.manual_seed(0)
    rng = np.random.default_rng(0)
    spec = AttentionSpec(HEADS, KV_HEADS, DIM, dtype, torch.device("cpu"), SIZE, DIM**-0.5)
    cache = torch.full((2, blocks, SIZE, KV_HEADS, DIM), torch.nan, dtype=dtype)
    free = iter(rng.permutation(np.arange(1, blocks)).tolist())
    widest = max(-(-n // SIZE) for _, n in rows) + 1
    table = torch.from_numpy(rng.integers(1, blocks, (len(rows), widest), dtype=np.int32))
    expected, queries = [], []
    for r, (count, total) in enumerate(rows):
        used = -(-total // SIZE)
        table[r, :used] = torch.tensor([next(free) for _ in range(used)], dtype=torch.int32)
        kv = torch.randn(2, total, KV_HEADS, DIM).to(dtype)
        places = table[r, torch.arange(total) // SIZE].long() * SIZE + torch.arange(total) % SIZE
        cache.view(2, -1, KV_HEADS, DIM)[:, places] = kv
        q = torch.randn(count, HEADS, DIM).to(dtype)
        queries.append(q)
        expected.append(oracle(q, kv[0], kv[1], spec.scale))
    counts, totals = [q for q, _ in rows], [n for _, n in rows]
    meta = AttentionMeta(
        block_table=table,
        seq_lens=torch.tensor(totals, dtype=torch.int32),
        cu_seqlens_q=torch.tensor([0, *np.cumsum(counts)], dtype=torch.int32),
        slot_mapping=torch.zeros(sum(counts), dtype=torch.long),
        seq_lens_host=totals,
        query_lens_host=counts,
        num_decodes=counts.count(1),
        max_seq_len=max(totals),
        max_query_len=max(counts),
    )
    backend = sdpa.SdpaBackend(spec)
    backend.plan(meta)
    out = torch.full((sum(counts), HEADS, DIM), torch.nan, dtype=dtype)
    backend.run(torch.cat(queries), cache[0], cache[1], meta, out)
    return float((out - torch.cat(expected)).abs().max())


@pytest.mark.parametrize("rows", [[(600, 600)], [(257, 900)], [(256, 300), (512, 513)], [(1, 20), (300, 700)]])
def test_long_queries_are_done_in_pieces(rows: list[tuple[int, int]]) -> None:
    assert compare(rows) < 2e-5


def test_decodes_of_all_lengths_are_done_in_any_order() -> None:
    lengths = np.random.default_rng(1).integers(1, 200, 40).tolist()
    assert compare([(1, n) for n in lengths], blocks=700) < 2e-5


def test_groups_of_decodes_are_split_when_they_would_gather_too_much(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sdpa, "_GROUP_TOKENS", 100)
    assert [len(group) for group in sdpa.groups_of_like_lengths([40] * 5)] == [2, 2, 1]
    assert compare([(1, 40)] * 5 + [(1, 150)]) < 2e-5


def test_groups_hold_every_row_once_and_waste_little() -> None:
    lengths = np.random.default_rng(2).integers(1, 5000, 300).tolist()
    groups = list(sdpa.groups_of_like_lengths(lengths))
    assert sorted(row for group in groups for row in group) == list(range(300))
    padded = sum(len(group) * max(lengths[row] for row in group) for group in groups)
    assert sum(lengths) <= padded < 1.25 * sum(lengths)
    assert len(groups) < 60
    assert list(sdpa.groups_of_like_lengths([])) == []


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_is_as_close_as_it_can_be(dtype: torch.dtype) -> None:
    assert compare([(1, 33), (1, 40), (20, 64)], dtype=dtype) < 0.03
