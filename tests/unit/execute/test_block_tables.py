"""Block tables on the device: as the host's at every step, by writing only what is new."""

from __future__ import annotations

import dataclasses

import numpy as np
import pytest
import torch

from nexusengine.execute.batch import StepBatch
from nexusengine.execute.block_tables import DeviceTables
from nexusengine.kv.manager import KVManager
from nexusengine.sampling.table import SamplingTable
from tests.unit.execute.test_torch_executor import Steps, made

SIZE = 16


def batch_of(kv: KVManager, lengths: dict[int, int]) -> StepBatch:
    """A decode step of slots that then have so many tokens."""
    slots, ends = np.array([*lengths], np.int32), np.array([*lengths.values()], np.int32)
    ones, flags = np.ones(len(slots), np.int32), np.ones(len(slots), np.bool_)
    sampling = SamplingTable.empty(len(kv.block_tables))
    return StepBatch(slots, ends - 1, ones, flags, ones, kv.block_tables, sampling, kv.releases)


def there_as_here(there: DeviceTables, kv: KVManager, lengths: dict[int, int]) -> bool:
    width = max(-(-n // SIZE) for n in lengths.values())
    found = there.rows(torch.tensor([*lengths]) + 1, width)
    return all(
        row[: -(-n // SIZE)].tolist() == kv.block_tables[slot, : -(-n // SIZE)].tolist()
        for row, (slot, n) in zip(found, lengths.items(), strict=True)
    )


def test_a_step_brings_the_entries_that_are_new_and_no_others() -> None:
    kv, there = KVManager(10_000, SIZE, 6, 4096), DeviceTables(torch.device("cpu"), 4096)
    kv.grow(4, 48)
    kv.grow(1, 65_000)
    lengths = {4: 48, 1: 65_000}
    assert there.update(batch_of(kv, lengths), SIZE) == 3 + 4063
    assert there_as_here(there, kv, lengths)
    assert there.update(batch_of(kv, lengths), SIZE) == 0
    kv.grow(4, 49)
    lengths = {1: 65_001, 4: 49}
    kv.grow(1, 65_001)
    assert there.update(batch_of(kv, lengths), SIZE) == 1
    assert there_as_here(there, kv, lengths)
    kv.release(4)
    kv.grow(4, 49)  # another request of the same length in the slot
    assert there.update(batch_of(kv, lengths), SIZE) == 4
    assert there_as_here(there, kv, lengths)
    untold = dataclasses.replace(batch_of(kv, {4: 49}), releases=None)
    assert [there.update(untold, SIZE) for _ in range(2)] == [4, 4]
    assert there.update(batch_of(kv, {4: 49}), SIZE) == 4, "what came in between is not known"
    assert there.rows(torch.tensor([0]), 4).tolist() == [[0, 0, 0, 0]], "the row of padding"


@pytest.mark.parametrize("seed", range(8))
def test_whatever_happens_to_tables_the_device_s_are_the_host_s(seed: int) -> None:
    """Requests come, grow, share prefixes, end and are preempted; steps run some of them, now and then untold."""
    rng, there = np.random.default_rng(seed), DeviceTables(torch.device("cpu"), 4)
    kv, lengths = KVManager(60, SIZE, 7, 12), dict[int, int]()
    for _ in range(200):
        slot = int(rng.integers(7))
        if slot not in lengths:
            hashes = [bytes([int(rng.integers(2)), i]) for i in range(4)]
            lengths[slot] = kv.admit(slot, hashes, 64) + 1
        elif rng.random() < 0.3:
            kv.commit(slot, [bytes([int(rng.integers(2)), i]) for i in range(4)], lengths[slot] - 1)
            kv.release(slot)
            del lengths[slot]
        else:
            lengths[slot] = min(lengths[slot] + int(rng.integers(1, 20)), 12 * SIZE)
        for lacking in [s for s, n in lengths.items() if not kv.grow(s, n)]:
            kv.release(lacking)
            del lengths[lacking]
        step = {s: n for s, n in lengths.items() if rng.random() < 0.6}
        if step:
            batch = batch_of(kv, step)
            there.update(dataclasses.replace(batch, releases=None) if rng.random() < 0.1 else batch, SIZE)
            assert there_as_here(there, kv, step)


def test_the_executor_computes_the_same_from_tables_on_the_device() -> None:
    told, staged = Steps(made(), temperature=1.0), Steps(made(), temperature=1.0)
    executor = staged.executor
    executor._tables = executor._device_tables()
    executor._upload = lambda arrays, graph: executor._staging.upload(arrays)  # type: ignore[method-assign]
    works: list[dict[int, list[int]]] = [
        {2: [5, 6, 7], 5: list(range(1, 35))},
        {2: [-1], 5: [-1]},
        {5: [-1], 0: [8, 9]},
    ]
    for work in works:
        assert staged.step(work).token_ids.tolist() == told.step(work).token_ids.tolist()
    moved = [3, 1, 2, 0, 4, 5, 6, 7]  # the slots' blocks change owners
    for steps in (told, staged):
        steps.tables[:] = steps.tables[moved]
        steps.done[:] = steps.done[moved]
        steps.releases += 1
        with torch.inference_mode():
            steps.executor._last_tokens[:] = steps.executor._last_tokens[moved]
    for work in ({2: [-1], 5: [-1]}, {3: [-1], 5: [4, 4]}):
        assert staged.step(work).token_ids.tolist() == told.step(work).token_ids.tolist()
