"""The attention kernels in the interpreter: splits, invariance, padding, and grids that outlive their plan."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch

pytest.importorskip("triton")

from nexusengine.attention import triton as backend_module
from nexusengine.attention.base import AttentionMeta, AttentionSpec
from nexusengine.attention.triton import TritonBackend
from nexusengine.triton_kernels import launch
from tests.support.attention_cases import Case, difference, make_case, run_case

pytestmark = pytest.mark.skipif(not launch.interpreted(), reason="needs TRITON_INTERPRET=1")
ROWS = [(1, 90), (1, 16), (1, 17), (1, 64), (1, 300), (20, 20), (33, 64)]


def spec(heads: tuple[int, int] = (8, 2), dim: int = 64, dtype: torch.dtype = torch.float32) -> AttentionSpec:
    return AttentionSpec(*heads, dim, dtype, torch.device("cpu"), 16, dim**-0.5)


@pytest.fixture
def small_splits(monkeypatch: pytest.MonkeyPatch) -> None:
    """Splits of 16 tokens, as many as there are."""
    monkeypatch.setattr(backend_module, "_SPLIT_TOKENS", 16)


@pytest.mark.usefixtures("small_splits")
@pytest.mark.parametrize("window", [None, 1, 20, 250])
@pytest.mark.parametrize("dim", [64, 80])
def test_a_decode_split_over_its_keys_is_merged_right(dim: int, window: int | None) -> None:
    wanted = replace(spec(dim=dim), window=window)
    backend = TritonBackend(wanted)
    assert difference(backend, make_case(wanted, ROWS)) < 2e-5
    assert backend.num_splits == 19


@pytest.mark.parametrize("window", [None, 1, 20, 250])
def test_rows_of_more_splits_than_there_may_be_have_larger_ones(
    monkeypatch: pytest.MonkeyPatch, window: int | None
) -> None:
    """The same beside shorter rows and alone, bit for bit."""
    monkeypatch.setattr(backend_module, "_SPLIT_TOKENS", 16)
    monkeypatch.setattr(backend_module, "_MOST_SPLITS", 4)
    wanted = replace(spec(), window=window)
    backend = TritonBackend(wanted)
    rows = [(1, 64), (1, 65), (1, 17), (1, 128), (1, 129), (1, 300), (20, 20)]
    case = make_case(wanted, rows)
    assert difference(backend, case) < 2e-5
    assert backend.num_splits == 4
    together = run_case(backend, case)
    for row in range(6):
        assert torch.equal(run_case(TritonBackend(wanted), _only(case, row, row)), together[row : row + 1]), rows[row]


def test_memory_between_the_two_kernels_of_a_decode_is_bounded_and_sized_by_the_decodes(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    taken: list[int] = []

    def launched(kernel: Any, grid: tuple[int, ...], *arguments: Any, **constants: Any) -> None:
        if kernel.__name__ == "_decode_kernel":
            taken.append(sum(t.nbytes for t in arguments[6:8]))

    monkeypatch.setattr(launch, "launch", launched)
    backend = TritonBackend(replace(spec((32, 8), 128), dtype=torch.bfloat16))
    cache = torch.zeros(2, 16, 8, 128, dtype=torch.bfloat16)

    def run(lengths: list[int], queries: list[int], longest: int) -> int:
        total = sum(queries)
        q, table = torch.empty(total, 32, 128, dtype=torch.bfloat16), torch.zeros(len(lengths), 1, dtype=torch.int32)
        numbers = torch.zeros(len(lengths) + 1, dtype=torch.int32)
        slots = torch.zeros(total, dtype=torch.long)
        ones = queries.count(1)
        meta = AttentionMeta(table, numbers[1:], numbers, slots, lengths, queries, ones, longest, max(queries))
        backend.plan(meta)
        backend.run(q, cache, cache, meta, torch.empty_like(q))
        return taken.pop()

    assert run([1] * 256, [1] * 256, 131_072) <= 2**28 + 2**22, "a graph of the longest rows"
    assert run([400] * 255 + [131_072], [1] * 255 + [512], 131_072) <= 2**24, "decodes beside a long prompt"


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_row_is_the_same_whatever_is_beside_it(monkeypatch: pytest.MonkeyPatch, dtype: torch.dtype) -> None:
    """Every bit is; alone, a row is planned with as few splits as it needs."""
    monkeypatch.setattr(backend_module, "_SPLIT_TOKENS", 64)
    wanted = spec(dtype=dtype)
    case = make_case(wanted, ROWS)
    together, start = run_case(TritonBackend(wanted), case), 0
    for row, (queries, length) in enumerate(ROWS):
        alone = _only(case, row, start)
        assert torch.equal(run_case(TritonBackend(wanted), alone), together[start : start + queries]), (queries, length)
        start += queries


@pytest.mark.usefixtures("small_splits")
def test_a_plan_for_longer_rows_and_padding_rows_changes_nothing() -> None:
    """As in a captured graph: the grid is that of the longest rows, lengths come later, padding rows have none."""
    wanted, rows = spec(), [(1, 90), (1, 16)]
    case = make_case(wanted, rows)
    expected = run_case(TritonBackend(wanted), case)
    meta, q = case.meta, torch.cat([case.q, case.q])
    padded = replace(
        meta,
        block_table=torch.cat([meta.block_table, torch.zeros_like(meta.block_table)]),
        seq_lens=torch.cat([meta.seq_lens, torch.zeros_like(meta.seq_lens)]),
        cu_seqlens_q=torch.arange(5, dtype=torch.int32),
        num_decodes=4,
        max_seq_len=1000,
    )
    backend, out = TritonBackend(wanted), torch.full_like(q, torch.nan)
    backend.plan(padded)
    backend.run(q, case.k_cache, case.v_cache, padded, out)
    assert torch.equal(out[:2], expected)
    assert torch.equal(out[2:], torch.zeros_like(out[2:]))


def test_queries_may_lie_between_other_numbers() -> None:
    """q is a view into q, k and v of a step, as the models give it."""
    wanted = spec()
    case = make_case(wanted, ROWS)
    wide = torch.full((len(case.q), 12, 64), torch.nan)
    wide[:, :8] = case.q
    assert difference(TritonBackend(wanted), replace(case, q=wide[:, :8])) < 2e-5


def _only(case: Case, row: int, start: int) -> Case:
    """The case of one of its rows, whose K and V are stored already."""
    meta, count = case.meta, case.meta.query_lens_host[row]
    alone = replace(
        meta,
        block_table=meta.block_table[row : row + 1],
        seq_lens=meta.seq_lens[row : row + 1],
        cu_seqlens_q=torch.tensor([0, count], dtype=torch.int32),
        slot_mapping=meta.slot_mapping[start : start + count],
        seq_lens_host=meta.seq_lens_host[row : row + 1],
        query_lens_host=[count],
        num_decodes=int(count == 1),
        max_seq_len=meta.seq_lens_host[row],
        max_query_len=count,
    )
    part = slice(start, start + count)
    return replace(case, meta=alone, q=case.q[part], new_k=case.new_k[part], new_v=case.new_v[part])
