"""Staging buffers, the read-back of results and overlapping steps, on the CPU device."""

from __future__ import annotations

import dataclasses
from typing import Any

import numpy as np
import pytest
import torch

from nexusengine.clock import MonotonicClock
from nexusengine.core.engine_core import EngineCore
from nexusengine.execute.batch import StepBatch
from nexusengine.execute.memory import DeviceMemory, MemoryPlan, graph_budget_bytes
from nexusengine.execute.staging import Staging, Timer
from nexusengine.execute.torch_executor import TorchExecutor
from nexusengine.perf.registry import make_model
from nexusengine.scheduler.baselines.fcfs import FCFS
from nexusengine.types import SamplingParams
from tests.support.fakes import request, run
from tests.unit.execute.test_graphs import Rehearsal
from tests.unit.execute.test_torch_executor import OPTIONS, Steps, made


def test_arrays_of_different_types_arrive_as_they_were() -> None:
    staging = Staging(torch.device("cpu"))
    given: dict[str, np.ndarray] = {
        "ids": np.arange(7, dtype=np.int64),
        "table": np.arange(6, dtype=np.int32).reshape(2, 3)[:, ::-1],
        "none": np.empty(0, np.int64),
        "lengths": np.array([3], np.int32),
    }
    there = staging.upload(given)
    for name, array in given.items():
        assert there[name].numpy().tolist() == array.tolist()
        assert there[name].shape == array.shape


def test_what_was_uploaded_holds_while_the_next_step_is_built() -> None:
    staging = Staging(torch.device("cpu"))
    first = staging.upload({"ids": np.full(9, 1)})["ids"]
    second = staging.upload({"ids": np.full(9, 2)})["ids"]
    assert set(first.tolist()) == {1}
    assert set(second.tolist()) == {2}
    large = staging.upload({"ids": np.arange(100_000)})["ids"]
    assert large.tolist() == list(range(100_000))
    assert set(second.tolist()) == {2}


def test_the_same_arrays_always_come_to_the_same_places_of_a_buffer_of_the_caller_s() -> None:
    staging, buffer = Staging(torch.device("cpu")), torch.zeros(4096, dtype=torch.uint8)
    places = []
    for value in (1, 2, 3):
        given = {"ids": np.full(7, value), "table": np.full((2, 3), value, np.int32), "few": np.full(value, 9)}
        there = staging.upload(given, buffer)
        assert all(there[name].tolist() == array.tolist() for name, array in given.items())
        assert all(buffer.data_ptr() <= t.data_ptr() < buffer.data_ptr() + 4096 for t in there.values())
        places.append({name: t.data_ptr() for name, t in there.items()})
    assert places[0] == places[1] == places[2]
    with pytest.raises(RuntimeError):
        staging.upload({"ids": np.zeros(1000)}, buffer)


def test_the_executor_computes_the_same_from_staged_inputs() -> None:
    told, staged = Steps(made(), temperature=1.0), Steps(made(), temperature=1.0)
    executor = staged.executor
    executor._upload = lambda arrays, graph: executor._staging.upload(arrays)  # type: ignore[method-assign]
    for work in ({2: [5, 6, 7], 5: [1, 2, 3, 4]}, {2: [-1], 5: [-1]}, {5: [-1], 0: [8, 9]}):
        assert staged.step(work).token_ids.tolist() == told.step(work).token_ids.tolist()


def test_two_overlapping_steps_are_collected_in_order() -> None:
    plain = Steps(made(), temperature=1.0)
    steps = Steps(made(options=dataclasses.replace(OPTIONS, overlap=True)), temperature=1.0)
    expected = [plain.step(work).token_ids.tolist() for work in ({1: [3, 4]}, {1: [-1]})]
    steps.submit({1: [3, 4]})
    steps.submit({1: [-1]})
    with pytest.raises(RuntimeError, match="in flight: 2"):
        steps.submit({1: [-1]})
    assert [steps.executor.collect().token_ids.tolist() for _ in range(2)] == expected


@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_text_is_the_same_with_and_without_overlap_and_graphs(temperature: float) -> None:
    """With graphs, block tables stay on the device while requests are preempted and slots change owners."""
    answers, preemptions = [], []
    for overlap, graphs in ((False, False), (True, False), (True, True)):
        executor = made(options=dataclasses.replace(OPTIONS, overlap=overlap, kv_cache_bytes=2**15))
        device = Rehearsal()
        if graphs:
            with torch.inference_mode():
                executor.capture_decodes(device, 2**30, OPTIONS.max_running)
        check_tables(executor)
        core = EngineCore(
            executor,
            FCFS(24),
            make_model(),
            clock=MonotonicClock(),
            max_running=4,
            hash_key=b"k",
            check_every_step=True,
        )
        for i in range(10):
            sampling = SamplingParams(
                temperature=temperature, seed=i, max_tokens=40 + 3 * i, stop_token_ids=(1, 2), logprobs=i % 3 or None
            )
            core.add(request(str(i), [i % 4, 5, 6, 7] * (1 + i % 5), sampling=sampling))
        answers.append({name: (tokens, last.finish_reason) for name, (tokens, last) in run(core).items()})
        assert core.stats().kv_used_blocks == 0
        assert (device.replays > 20) == graphs
        preemptions.append(core.stats().preemptions)
    assert answers[0] == answers[1] == answers[2]
    assert min(preemptions) > 0


def check_tables(executor: TorchExecutor) -> None:
    """Each step is checked to see the host's block tables: a model this small hardly shows what attention reads."""
    build = executor._inputs

    def checked(batch: StepBatch, sampled_rows: np.ndarray) -> Any:
        inputs = build(batch, sampled_rows)
        for row, (slot, end) in enumerate(zip(batch.slots, batch.starts + batch.counts, strict=True)):
            used = -(-int(end) // executor.spec.block_size)
            assert inputs.meta.block_table[row, :used].tolist() == batch.block_tables[slot, :used].tolist()
        return inputs

    executor._inputs = checked  # type: ignore[method-assign]


class FakeEvent:
    """A place in the work of a device that takes a millisecond for each mark."""

    marks = 0

    def __init__(self, device: str, enable_timing: bool = False) -> None:
        self.at_ms = 0

    def record(self) -> None:
        FakeEvent.marks += 1
        self.at_ms = FakeEvent.marks

    def synchronize(self) -> None:
        return

    def elapsed_time(self, other: FakeEvent) -> float:
        return float(other.at_ms - self.at_ms)


def test_a_step_on_a_gpu_begins_where_its_work_is_launched_and_idleness_is_told_apart(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(torch, "Event", FakeEvent)
    monkeypatch.setattr(FakeEvent, "marks", 0)
    device, busy = torch.device("cuda", 0), FakeEvent("cuda")
    first = Timer(device)
    busy.record()  # inputs of the first step are built
    first.begin()
    first.stop()
    second = Timer(device, first)
    for _ in range(5):
        busy.record()
    second.begin()
    for _ in range(3):
        busy.record()
    second.stop()
    assert first.seconds() == (0.001, 0.0)
    assert second.seconds() == (0.004, 0.006)


@pytest.mark.parametrize("graphs", [False, True])
def test_the_timer_begins_after_inputs_and_plan_just_before_the_forward_pass(
    monkeypatch: pytest.MonkeyPatch, graphs: bool
) -> None:
    steps, log = Steps(made()), list[str]()
    executor = steps.executor
    if graphs:
        with torch.inference_mode():
            executor.capture_decodes(Rehearsal(), 2**30, OPTIONS.max_running)
    steps.step({0: [5, 6, 7]})

    def noted(name: str, owner: object, method: str) -> None:
        real = getattr(owner, method)

        def call(*args: object) -> object:
            log.append(name)
            return real(*args)

        monkeypatch.setattr(owner, method, call)

    noted("inputs", executor, "_upload")
    noted("plan", executor._attention, "plan")
    noted("begin", Timer, "begin")
    noted("stop", Timer, "stop")
    noted("forward", executor._model, "forward")
    result = steps.step({0: [-1]})
    assert log == ["inputs", "plan", "begin", "forward", "stop"]
    assert result.device_s > 0
    assert result.idle_s > 0


def test_a_memory_plan_accounts_for_every_byte() -> None:
    memory = DeviceMemory(total=1000, weights=300, free=530, default_kv=530, activations=50, graphs=20, reserve=100)
    plan = MemoryPlan(memory, kv=500, num_blocks=5, max_model_len=64)
    assert plan.parts()["unused"] == 30
    assert sum(plan.parts().values()) == memory.total
    assert graph_budget_bytes(80 * 10**9) == 2 * 2**30
    assert graph_budget_bytes(2**30) == 2**25
