"""CUDA graphs without CUDA: which are captured, what they may take, and that padding changes nothing."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from nexusengine.execute.base import ExecutorOptions
from nexusengine.execute.batch import StepBatch
from nexusengine.execute.decode_graphs import CudaGraphDevice
from nexusengine.execute.graphs import Captured, GraphShape, GraphTable, length_buckets, row_buckets
from tests.unit.execute.test_torch_executor import OPTIONS, Steps, made


class Bookkeeper:
    """Captures nothing; each takes as many bytes as it has rows, and what a refused one took comes back.

    fails: the numbers of rows whose capture raises `error`.
    """

    def __init__(self, fails: frozenset[int] = frozenset(), error: Exception | None = None) -> None:
        self.captures: list[int] = []
        self.taken, self.given_back = 1000, 0
        self._fails, self._error = fails, error or RuntimeError("operation not permitted when stream is capturing")

    def capture(self, compute: Callable[[], int]) -> Captured[int]:
        rows = compute()
        if rows in self._fails:
            raise self._error
        self.captures.append(rows)
        self.taken += rows
        return Captured(lambda: None, rows)

    def used_bytes(self) -> int:
        return self.taken

    def give_back(self) -> None:
        self.given_back += 1


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

    def give_back(self) -> None:
        return


def table(
    device: Bookkeeper, budget_bytes: int = 10_000, max_rows: int = 64, max_tokens: int = 8192
) -> GraphTable[int]:
    return GraphTable(device, max_rows, max_tokens, budget_bytes)


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
    found.capture_all(rows_of)
    assert found.shape_for(9, 1024) == GraphShape(16, 1024)
    assert found.shape_for(1, 1025) == GraphShape(1, 4096)
    assert found.shape_for(17, 4097) == GraphShape(32, 8192), "of long rows there are fewer shapes"
    assert found.shape_for(65, 10) is None
    assert found.shape_for(1, 8193) is None


def test_every_shape_is_captured_at_once_the_largest_first() -> None:
    device, told = Bookkeeper(), list[float]()
    graphs = table(device, max_rows=16, max_tokens=2000)
    graphs.capture_all(rows_of, told.append)
    assert device.captures == [16, 16, 8, 8, 4, 4, 2, 2, 1, 1]
    assert graphs.captured[:2] == (GraphShape(16, 2000), GraphShape(16, 1024))
    assert graphs.used_bytes == 62
    assert not graphs.refused
    assert told == [i / 10 for i in range(10)]
    assert device.given_back == 1, "what the runs before each capture left in the allocator"


def test_what_does_not_fit_the_budget_has_no_graph_for_a_reason_and_a_larger_one_takes_its_steps() -> None:
    device = Bookkeeper()
    graphs = table(device, budget_bytes=20, max_rows=16, max_tokens=1024)
    graphs.capture_all(rows_of)
    assert graphs.captured == (GraphShape(16, 1024), GraphShape(4, 1024))
    assert "8 bytes" in graphs.refused[GraphShape(8, 1024)]
    assert "used up" in graphs.refused[GraphShape(1, 1024)]
    assert graphs.shape_for(1, 1000) == GraphShape(4, 1024)
    assert graphs.shape_for(5, 1000) == GraphShape(16, 1024)
    assert graphs.graph(GraphShape(4, 1024)).output == 4
    assert device.given_back == 2


class OutOfResources(Exception):
    """Triton's is no RuntimeError."""


@pytest.mark.parametrize("error", [RuntimeError("not permitted"), OutOfResources("not permitted"), KeyError("x")])
def test_a_capture_that_fails_whatever_it_raises_turns_graphs_off_for_good(error: Exception) -> None:
    device = Bookkeeper(fails=frozenset({8}), error=error)
    graphs = table(device, max_rows=16, max_tokens=1024)
    graphs.capture_all(rows_of)
    assert device.captures == [16], "nothing is tried after it"
    assert not graphs.captured
    assert graphs.shape_for(1, 10) is None
    assert "8 rows up to 1024 tokens" in graphs.failure
    assert f"{type(error).__name__}: {error}" in graphs.failure


def test_an_executor_whose_capture_fails_says_so_once_and_runs_without_graphs(
    caplog: pytest.LogCaptureFixture,
) -> None:
    class Broken(Rehearsal):
        def capture(self, compute: Callable[[], torch.Tensor]) -> Captured[torch.Tensor]:
            raise OutOfResources("shared memory")

    plain, broken = Steps(made()), Steps(made())
    with caplog.at_level("INFO"), torch.inference_mode():
        broken.executor.capture_decodes(Broken(), 2**30, OPTIONS.max_running)
    assert [r.getMessage() for r in caplog.records if "without graphs" in r.getMessage()] == [
        "all steps run without graphs: the graph of 8 rows up to 128 tokens could not be captured: "
        "OutOfResources: shared memory"
    ]
    assert broken.executor.graphs is None
    for work in ({0: [5, 6, 7]}, {0: [-1]}, {0: [-1]}):
        assert broken.step(work).token_ids.tolist() == plain.step(work).token_ids.tolist()


class FakeCuda:
    """torch.cuda as far as a capture needs it: streams by name, and a log of what was done on which.

    before_2_12: `capture_end` of a capture that failed raises before it takes the allocator out of the pool.
    """

    def __init__(self, monkeypatch: pytest.MonkeyPatch, before_2_12: bool) -> None:
        cuda = self
        self.streams, self.current, self.in_pool, self.log = 0, "usual", False, list[str]()

        class Stream:
            def __init__(self, device: object = None) -> None:
                cuda.streams += 1
                self.name = f"stream {cuda.streams}"

            def wait_stream(self, other: object) -> None:
                return

        class Graph:
            def capture_begin(self, pool: object) -> None:
                cuda.in_pool = True
                cuda.log.append(f"capture on {cuda.current}")

            def capture_end(self) -> None:
                if cuda.log[-1] == "failed":
                    if not before_2_12:
                        cuda.in_pool = False
                    raise RuntimeError("operation failed due to a previous error during capture")
                cuda.in_pool = False

            def replay(self) -> None:
                return

        def end_allocate(index: int, pool: object) -> None:
            if not cuda.in_pool:
                raise RuntimeError("endAllocatePool: not currently recording to mempool_id")
            cuda.in_pool = False

        @contextlib.contextmanager
        def stream(new: Stream) -> Iterator[None]:
            before, cuda.current = cuda.current, new.name
            try:
                yield
            finally:
                cuda.current = before

        usual = Stream()
        self.streams = 0
        for name, stand_in in {
            "Stream": Stream, "CUDAGraph": Graph, "stream": stream, "current_stream": lambda device: usual,
            "synchronize": lambda device: None, "graph_pool_handle": lambda: (0, 1), "current_device": lambda: 0,
        }.items():  # fmt: skip
            monkeypatch.setattr(torch.cuda, name, stand_in)
        monkeypatch.setattr(torch._C, "_cuda_endAllocateToPool", end_allocate, raising=False)

    def compute(self) -> torch.Tensor:
        self.log.append(f"compute on {self.current}")
        return torch.zeros(1)


def test_all_captures_and_the_runs_before_them_share_one_stream(monkeypatch: pytest.MonkeyPatch) -> None:
    cuda = FakeCuda(monkeypatch, before_2_12=True)
    device = CudaGraphDevice(torch.device("cuda", 0))
    for _ in range(3):
        device.capture(cuda.compute)
    assert cuda.streams == 1
    assert cuda.log == ["compute on stream 1", "capture on stream 1", "compute on stream 1"] * 3
    assert (cuda.current, cuda.in_pool) == ("usual", False)


@pytest.mark.parametrize("before_2_12", [True, False])
def test_after_a_failed_capture_stream_and_allocator_are_as_before(
    monkeypatch: pytest.MonkeyPatch, before_2_12: bool
) -> None:
    cuda = FakeCuda(monkeypatch, before_2_12)

    def compute() -> torch.Tensor:
        if cuda.log:
            cuda.log.append("failed")
            raise OutOfResources("shared memory")
        return cuda.compute()

    device = CudaGraphDevice(torch.device("cuda", 0))
    with pytest.raises(OutOfResources):
        device.capture(compute)
    assert (cuda.current, cuda.in_pool) == ("usual", False)


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
    steps.step(work)
    slots = np.array([0, 1, 3], np.int32)
    ids = np.array([w[0] for w in work.values()], np.int32)
    flags = np.ones(3, np.bool_)
    ones, starts = np.ones(3, np.int32), steps.done[slots]
    batch = StepBatch(slots, starts, ones, flags, ids, steps.tables, steps.sampling, steps.releases)
    with torch.inference_mode(), Operations() as operations:
        inputs = executor._inputs(batch, np.arange(3))
    copies = [numel for name, numel in operations.written if name == "aten::copy_"]
    assert len(copies) == 1
    others = [name for name, _ in operations.written if name != "aten::copy_"]
    assert others == ["aten::index_select", *([] if told else ["aten::where"])], "tables are picked on the device"
    assert inputs.graph == GraphShape(4, 128)
    assert executor.graphs is not None
    start = executor.graphs.inputs.data_ptr()
    for tensor in (inputs.token_ids, inputs.positions, inputs.last, inputs.sampled_slots, inputs.meta.slot_mapping):
        assert start <= tensor.data_ptr() < start + executor.graphs.inputs.numel()
    assert inputs.meta.block_table.data_ptr() == executor.graphs.block_table(GraphShape(4, 128)).data_ptr()
    assert inputs.meta.block_table[:, :1].tolist() == [*steps.tables[slots, :1].tolist(), [0]], (
        "all that the step reads"
    )
    assert inputs.meta.slot_mapping.tolist()[3:] == [-1]
    assert inputs.meta.seq_lens.tolist()[3:] == [1]
    assert (inputs.token_ids >= 0).all()


def test_a_closed_executor_captures_nothing() -> None:
    executor = made()
    executor.close()
    with pytest.raises(RuntimeError, match="closed"):
        executor.capture_decodes(Rehearsal(), 2**30, 8)
