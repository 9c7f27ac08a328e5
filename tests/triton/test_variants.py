"""Steps of other sizes run the programs that are there: a program compiled in the middle of serving would stop it."""

from __future__ import annotations

import pytest
import torch

pytest.importorskip("triton")

from nexusengine.triton_kernels import attention, decode_attention, launch, prefill_attention, rope

from .offline import Recorder

pytestmark = pytest.mark.skipif(launch.interpreted(), reason="TRITON_INTERPRET=1 is set: nothing is compiled")
CAPABILITY = (9, 0)
CACHE = torch.zeros(4, 16, 8, 128, dtype=torch.bfloat16)


@pytest.fixture
def recorder(monkeypatch: pytest.MonkeyPatch) -> Recorder:
    made = Recorder(CAPABILITY, compiled=False)
    monkeypatch.setattr(launch, "launch", made)
    return made


def integers(count: int, at: int = 0, dtype: torch.dtype = torch.int32) -> torch.Tensor:
    """As part of one upload: it begins wherever what lies before it ends."""
    return torch.zeros(count + at, dtype=dtype)[at:]


def test_decodes_of_any_batch_are_one_program_and_one_that_merges(recorder: Recorder) -> None:
    shape = attention.Shape(32, 8, 128, 16, 0.1)
    for rows, columns, splits, at in [(1, 1, 2, 0), (2, 17, 16, 1), (16, 16, 3, 4), (7, 40, 32, 3), (33, 65, 5, 2)]:
        q = torch.zeros(rows, 48, 128, dtype=torch.bfloat16)[:, :32]
        table, lengths = integers(rows * columns, at).view(rows, columns), integers(rows, at)
        decode_attention.decode(q, CACHE, CACHE, table, lengths, q[:, :32].clone(), shape, splits, 256, CAPABILITY)
    assert {name: len(found) for name, found in recorder.variants.items()} == {"_decode_kernel": 1, "_merge_kernel": 1}


def test_prompts_of_any_batch_are_one_program(recorder: Recorder) -> None:
    shape = attention.Shape(32, 8, 128, 16, 0.1)
    for rows, columns, first, at in [(1, 1, 0, 0), (2, 16, 1, 1), (16, 17, 15, 2), (40, 33, 16, 3), (5, 32, 0, 4)]:
        q = torch.zeros(3 * rows, 48, 128, dtype=torch.bfloat16)[:, :32]
        table, lengths, starts = (
            integers(rows * columns, at).view(rows, columns),
            integers(rows, at),
            integers(rows + 1, at),
        )
        prefill_attention.prefill(q, CACHE, CACHE, table, lengths, starts, q.clone(), shape, first, CAPABILITY)
    assert {name: len(found) for name, found in recorder.variants.items()} == {"_prefill_kernel": 1}


def test_rotation_and_store_of_any_number_of_tokens_are_one_program(recorder: Recorder) -> None:
    cos = torch.zeros(64, 64, dtype=torch.bfloat16)
    for tokens, at in [(1, 0), (2, 1), (16, 0), (33, 1)]:
        qkv, numbers = torch.zeros(tokens, 48 * 128, dtype=torch.bfloat16), integers(tokens, at, torch.int64)
        rope.rotate_and_store(qkv, cos, cos, numbers, numbers, CACHE, CACHE, (32, 8, 128))
        rope.store(torch.zeros(tokens, 8, 128), torch.zeros(tokens, 8, 128), CACHE, CACHE, numbers)
    assert {len(found) for found in recorder.variants.values()} == {1}
