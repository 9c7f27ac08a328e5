"""Block tables on the device: as the host's at every step, by writing only what changed."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from nexusengine.execute.block_tables import DeviceTables
from tests.unit.execute.test_torch_executor import Steps, made


def picked(there: DeviceTables, slots: list[int], width: int) -> list[list[int]]:
    return there.rows(torch.tensor(slots) + 1, width).tolist()


def test_a_step_brings_the_entries_that_changed_and_no_others() -> None:
    host, there = np.zeros((6, 4096), np.int32), DeviceTables(torch.device("cpu"), 4096)
    slots = np.array([4, 1], np.int32)
    host[4, :3], host[1, :2] = (7, 8, 9), (5, 6)
    assert there.update(host, slots, 3) == 5
    assert picked(there, [4, 1], 3) == [[7, 8, 9], [5, 6, 0]]
    assert there.update(host, slots, 3) == 0
    host[1, 2] = 10  # a block more
    assert there.update(host, slots[::-1].copy(), 3) == 1
    assert picked(there, [1, 4], 3) == [[5, 6, 10], [7, 8, 9]]
    host[4, :] = 0  # another request in the slot
    host[4, 0] = 11
    assert there.update(host, slots, 3) == 3
    assert picked(there, [4, 1], 3) == [[11, 0, 0], [5, 6, 10]]
    assert picked(there, [-1], 3) == [[0, 0, 0]], "the row of padding"


def test_entries_beyond_the_width_of_a_step_come_when_they_are_read() -> None:
    host, there = np.arange(1, 33, dtype=np.int32).reshape(2, 16), DeviceTables(torch.device("cpu"), 16)
    slots = np.arange(2, dtype=np.int32)
    assert there.update(host, slots[:1], 2) == 2
    assert there.update(host, slots, 16) == 30
    assert picked(there, [0, 1], 16) == host.tolist()


@pytest.mark.parametrize("seed", range(5))
def test_whatever_happens_to_tables_the_device_s_are_the_host_s(seed: int) -> None:
    """More slots and columns than at first included."""
    rng, there = np.random.default_rng(seed), DeviceTables(torch.device("cpu"), 4)
    host = np.zeros((3, 5), np.int32)
    for step in range(60):
        if step == 30:
            host = np.zeros((9, 12), np.int32)
        for _ in range(rng.integers(4)):
            host[rng.integers(len(host)), rng.integers(host.shape[1]) :] = rng.integers(100)
        slots = rng.permutation(len(host))[: rng.integers(1, len(host) + 1)].astype(np.int32)
        width = int(rng.integers(1, host.shape[1] + 1))
        there.update(host, slots, width)
        assert picked(there, slots.tolist(), width) == host[slots, :width].tolist()


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
        with torch.inference_mode():
            steps.executor._last_tokens[:] = steps.executor._last_tokens[moved]
    for work in ({2: [-1], 5: [-1]}, {3: [-1], 5: [4, 4]}):
        assert staged.step(work).token_ids.tolist() == told.step(work).token_ids.tolist()
