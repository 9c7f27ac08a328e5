"""Calibration: made-up steps before serving, bounded in time, leaving nothing behind."""

from __future__ import annotations

import numpy as np
import pytest

from nexusengine.clock import VirtualClock
from nexusengine.config import EngineConfig
from nexusengine.core.engine_core import EngineCore
from nexusengine.errors import ConfigError
from nexusengine.execute.base import ExecutorSpec
from nexusengine.execute.batch import StepBatch, StepResult
from nexusengine.model_config import ModelConfig
from nexusengine.perf.features import StepFeatures
from nexusengine.perf.online import OnlineModel
from nexusengine.worker.build import make_core, step_log_path
from nexusengine.worker.calibrate import calibrate
from tests.support.devices import Roofline
from tests.support.fakes import FakeExecutor, continuation, request, run

GEOMETRY = ModelConfig("llama", 49_152, 576, 1536, 30, 9, 3, 64, 8192, 1e-5, 1e4)


class RooflineExecutor:
    """Takes virtual time; checks what it is given as far as FakeExecutor's spec goes."""

    def __init__(self, device: Roofline, clock: VirtualClock, **limits: int) -> None:
        values = {"num_blocks": 4000, "max_model_len": 8192, "max_batch_tokens": 2048, "ready_blocks": 0, **limits}
        self.spec = ExecutorSpec(
            "cuda:0", "bfloat16", 16, values["num_blocks"], values["max_model_len"], values["max_batch_tokens"], 1000,
            "fake", 0, 0, ready_blocks=values["ready_blocks"],
        )  # fmt: skip
        self.steps: list[StepFeatures] = []
        self.highest_block = 0
        self._device, self._clock = device, clock

    def submit(self, batch: StepBatch) -> None:
        ends = batch.starts + batch.counts
        assert ends.max() <= self.spec.max_model_len
        assert batch.counts.sum() == len(batch.token_ids) <= self.spec.max_batch_tokens
        held = [batch.block_tables[s, : -(-end // 16)] for s, end in zip(batch.slots, ends, strict=True)]
        blocks = np.concatenate(held)
        assert (blocks > 0).all()
        assert (blocks < self.spec.num_blocks).all()
        assert len(np.unique(blocks)) == len(blocks), "two rows write the same block"
        self.highest_block = max(self.highest_block, int(blocks.max()))
        self.steps.append(StepFeatures.of(batch.counts, batch.starts))
        self._rows = int(batch.sampled.sum())

    def collect(self) -> StepResult:
        seconds = self._device.step_s(self.steps[-1])
        self._clock.advance(seconds)
        return StepResult(np.zeros(self._rows, np.int32), seconds)

    def close(self) -> None:
        pass


def test_a_fast_device_is_known_before_its_first_request() -> None:
    device, clock, model = Roofline(), VirtualClock(), OnlineModel()
    executor = RooflineExecutor(device, clock)
    taught = calibrate(executor, model, max_running=256, timer=clock.now)
    assert clock.now() <= 2.0
    assert len(taught) == model.steps >= 25
    assert max(s.tokens for s in executor.steps) == 2048
    for step in (
        StepFeatures(12, 12, 0, 0.0, 12 * 700),
        StepFeatures(40, 40, 0, 0.0, 40 * 500),
        StepFeatures(300, 1, 1, 300 * 150.0, 0),
        StepFeatures(1500, 30, 1, 1471 * 1000.0, 29 * 300),
    ):
        assert model.predict(step).mean_s == pytest.approx(device.step_s(step), rel=0.15)


def test_a_slow_device_is_not_held_up_for_longer_than_was_allowed() -> None:
    slow = Roofline(weights_s=0.15, token_s=0.01, mixed_s=0.0)
    clock, model = VirtualClock(), OnlineModel()
    executor = RooflineExecutor(slow, clock)
    taught = calibrate(executor, model, max_running=256, timer=clock.now)
    assert 2 <= len(taught) < 20
    assert clock.now() <= 2.5  # one step can be longer than foreseen
    assert max(s.tokens for s in executor.steps) < 256


def test_blocks_without_memory_are_not_read() -> None:
    clock, model = VirtualClock(), OnlineModel()
    executor = RooflineExecutor(Roofline(), clock, ready_blocks=100)
    assert calibrate(executor, model, max_running=256, timer=clock.now)
    assert executor.highest_block < 100


def test_shapes_that_do_not_fit_the_executor_are_left_out() -> None:
    clock, model = VirtualClock(), OnlineModel()
    executor = RooflineExecutor(Roofline(), clock, num_blocks=20, max_model_len=256, max_batch_tokens=64)
    calibrate(executor, model, max_running=4, timer=clock.now)
    assert executor.steps
    assert all(s.tokens <= 64 and s.sequences <= 4 for s in executor.steps)


def test_a_core_serves_the_same_answers_after_calibration() -> None:
    executor = FakeExecutor(num_blocks=200, max_model_len=256)
    executor.cache[:] = 5  # what calibration reads was written by nobody
    core = make_core(executor, EngineConfig(max_running=8, max_waiting=8), VirtualClock())
    assert core.scheduler.model.snapshot().steps > 0
    assert core.kv.free_blocks == core.kv.total_blocks
    core.kv.check()
    core.add(request("a", [1, 2, 3, 4, 5, 6], 5))
    core.add(request("b", [9] * 20, 5))
    ended = run(core)
    assert ended["a"][0] == continuation([1, 2, 3, 4, 5, 6], 5)
    assert ended["b"][0] == continuation([9] * 20, 5)


def test_calibration_can_be_switched_off_and_is_not_done_on_emulated_devices() -> None:
    executor = FakeExecutor()
    core = make_core(executor, EngineConfig(max_running=8, max_waiting=8, calibrate=False), VirtualClock())
    assert executor.batches == []
    assert core.scheduler.model.snapshot().steps == 0


def test_each_worker_logs_its_steps_to_a_file_of_its_own() -> None:
    one = EngineConfig(devices="cpu:1", step_log="/x/steps.jsonl.gz")
    two = EngineConfig(devices="cpu:1,cpu:1", step_log="/x/steps.jsonl.gz")
    assert str(step_log_path(one, "w0")) == "/x/steps.jsonl.gz"
    assert str(step_log_path(two, "w1")) == "/x/steps.w1.jsonl.gz"


def test_a_step_log_that_cannot_be_written_is_refused() -> None:
    config = EngineConfig(max_running=8, max_waiting=8, calibrate=False, step_log="/nowhere/steps.jsonl.gz")
    with pytest.raises(ConfigError, match=r"cannot write the step log /nowhere/steps\.jsonl\.gz"):
        make_core(FakeExecutor(), config, VirtualClock())


def test_the_first_step_after_a_pause_is_told_apart() -> None:
    told: list[str] = []

    class Spy(OnlineModel):
        def observe(self, features: StepFeatures, seconds: float) -> None:
            told.append("warm")

        def observe_cold(self, features: StepFeatures, seconds: float) -> None:
            told.append("cold")

    from nexusengine.scheduler.baselines.fcfs import FCFS

    clock = VirtualClock()
    core = EngineCore(FakeExecutor(clock=clock), FCFS(), Spy(), clock=clock, max_running=4, max_waiting=4)
    core.add(request("a", [1, 2], 2))
    run(core)
    for _ in range(4):  # a worker with nothing to do looks for work twice a second
        clock.advance(0.5)
        core.step()
    core.add(request("b", [1, 2], 3))
    run(core)
    assert told == ["warm", "warm", "cold", "warm", "warm"]
