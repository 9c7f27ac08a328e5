"""CUDA graphs without CUDA: which are captured, what they may take, and that padding changes nothing."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from nexusengine.execute.base import ExecutorOptions
from nexusengine.execute.batch import StepBatch
from nexusengine.execute.graphs import Captured, GraphShape, GraphTable, length_buckets, row_buckets
from tests.unit.execute.test_torch_executor import OPTIONS, Steps, made


class Bookkeeper:
    """Captures nothing; each takes as many bytes as it has rows. fails: shapes whose capture raises."""

    def __init__(self, fails: frozenset[int] = frozenset()) -> None:
        self.captures: list[int] = []
        self.taken = 1000
        self._fails = fails

    def capture(self, compute: Callable[[], int]) -> Captured[int]:
        rows = compute()
        if rows in self._fails:
            raise RuntimeError("operation not permitted when stream is capturing")
        self.captures.append(rows)
        self.taken += rows
        return Captured(lambda: None, rows)

    def used_bytes(self) -> int:
        return self.taken


class Rehearsal:
    """Computes where a graph would be replayed, from the same fixed places into the same output."""

    def __init__(self) -> None:
        self.captures = self.replays = 0

    def capture(self, compute: Callable[[], torch.Tensor]) -> Captured[torch.Tensor]:
        output = compute().clone()
        self.captures += 1

        def replay() -> None:
            self.replays += 1
            output.copy_(compute())

        return Captured(replay, output)

    def used_bytes(self) -> int:
        return 0


def table(device: Bookkeeper, budget_bytes: int = 10_000, max_rows: int = 64) -> GraphTable[int]:
    return GraphTable(device, max_rows, 8192, budget_bytes)


def rows_of(shape: GraphShape) -> Callable[[], int]:
    return lambda: shape.rows


def test_buckets_end_with_the_most_there_can_be() -> None:
    assert row_buckets(256)[:6] == (1, 2, 4, 8, 16, 24)
    assert row_buckets(256)[-1] == 256
    assert row_buckets(5) == (1, 2, 4, 5)
    assert row_buckets(4096)[-1] == 256
    assert length_buckets(5000) == (1024, 4096, 5000)
    assert length_buckets(128) == (128,)


def test_a_step_takes_the_smallest_shape_that_holds_it() -> None:
    found = table(Bookkeeper())
    assert found.shape_for(9, 1024) == GraphShape(16, 1024)
    assert found.shape_for(1, 1025) == GraphShape(1, 4096)
    assert found.shape_for(65, 10) is None
    assert found.shape_for(1, 8193) is None


def test_the_largest_shape_of_a_length_is_captured_first_and_each_once() -> None:
    device = Bookkeeper()
    graphs = table(device)
    for rows in (3, 3, 9, 64):
        shape = graphs.shape_for(rows, 100)
        assert shape is not None
        assert graphs.graph(shape, rows_of) is not None
    assert device.captures == [64, 4, 16]
    assert graphs.used_bytes == 84
    assert not graphs.refused


def test_what_does_not_fit_the_budget_runs_without_a_graph_for_a_reason() -> None:
    device = Bookkeeper()
    graphs = table(device, budget_bytes=20)
    assert graphs.graph(GraphShape(16, 1024), rows_of) is not None
    assert "64 bytes" in graphs.refused[GraphShape(64, 1024)]
    assert graphs.graph(GraphShape(4, 1024), rows_of) is not None
    assert graphs.graph(GraphShape(1, 1024), rows_of) is None
    assert "used up" in graphs.refused[GraphShape(1, 1024)]
    assert graphs.used_bytes == 20


def test_a_capture_that_fails_is_not_tried_again() -> None:
    device = Bookkeeper(fails=frozenset({64, 8}))
    graphs = table(device)
    assert graphs.graph(GraphShape(8, 1024), rows_of) is None
    assert graphs.graph(GraphShape(8, 1024), rows_of) is None
    assert graphs.graph(GraphShape(2, 1024), rows_of) is not None
    assert device.captures == [2]
    assert "not permitted" in graphs.refused[GraphShape(8, 1024)]


@pytest.mark.parametrize("backend", ["sdpa", None])
def test_padded_decodes_at_fixed_places_give_the_same_tokens(backend: str | None) -> None:
    options = ExecutorOptions(
        kv_cache_bytes=2**20, max_running=8, max_batch_tokens=64, seed=1, attention_backend=backend
    )
    prompts = {0: [5, 6, 7], 1: [9], 3: [1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15, 16, 17]}
    plain, graphed = Steps(made(options=options), temperature=1.0), Steps(made(options=options), temperature=1.0)
    device = Rehearsal()
    with torch.inference_mode():
        graphed.executor.capture_decodes(device, 2**30, OPTIONS.max_running)
        assert graphed.executor.kv is not None
        graphed.executor.kv[:, :, 0] = 0.0  # the null block's content must be finite, as a fresh cache's is
    for steps in (plain, graphed):
        steps.step(prompts)
    works: list[dict[int, list[int]]] = [{0: [-1], 1: [-1], 3: [-1]}, {3: [-1]}, {0: [-1], 3: [-1]}]
    for work in works * 4:
        assert graphed.step(work).token_ids.tolist() == plain.step(work).token_ids.tolist()
    assert device.replays == 12
    assert device.captures == 4


class Operations(TorchDispatchMode):
    """Names of torch's operations that write, by the size of what they write."""

    def __init__(self) -> None:
        super().__init__()
        self.written: list[tuple[str, int]] = []

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if function._schema.is_mutable:
            self.written.append((function._schema.name, args[0].numel()))
        return function(*args, **(kwargs or {}))


@pytest.mark.parametrize("told", [True, False], ids=["ids known to the host", "ids that the device alone knows"])
def test_a_step_s_inputs_come_to_a_graph_s_places_in_one_copy(told: bool) -> None:
    executor = made(options=ExecutorOptions(kv_cache_bytes=2**20, max_running=8, max_batch_tokens=64, seed=1))
    steps, device = Steps(executor), Rehearsal()
    with torch.inference_mode():
        executor.capture_decodes(device, 2**30, OPTIONS.max_running)
        assert executor.kv is not None
        executor.kv[:, :, 0] = 0.0
    work = {0: [3], 1: [5], 3: [8]} if told else {0: [-1], 1: [-1], 3: [-1]}
    steps.step({0: [5, 6, 7], 1: [9], 3: [1, 2, 3]})
    steps.step(work)  # captures
    slots = np.array([0, 1, 3], np.int32)
    ids = np.array([w[0] for w in work.values()], np.int32)
    flags = np.ones(3, np.bool_)
    batch = StepBatch(slots, steps.done[slots], np.ones(3, np.int32), flags, ids, steps.tables, steps.sampling)
    with torch.inference_mode(), Operations() as operations:
        inputs = executor._inputs(batch, np.arange(3))
    copies = [numel for name, numel in operations.written if name == "aten::copy_"]
    assert len(copies) == 1
    assert [name for name, _ in operations.written if name != "aten::copy_"] == ([] if told else ["aten::where"])
    assert inputs.graph == GraphShape(4, 128)
    assert executor.graphs is not None
    start = executor.graphs.inputs.data_ptr()
    for tensor in (inputs.token_ids, inputs.positions, inputs.last, inputs.sampled_slots, inputs.meta.block_table):
        assert start <= tensor.data_ptr() < start + executor.graphs.inputs.numel()
    assert inputs.meta.slot_mapping.tolist()[3:] == [-1]
    assert inputs.meta.seq_lens.tolist()[3:] == [1]
    assert (inputs.token_ids >= 0).all()


def test_a_closed_executor_captures_nothing() -> None:
    executor = made()
    executor.close()
    with pytest.raises(RuntimeError, match="closed"):
        executor.capture_decodes(Rehearsal(), 2**30, 8)
