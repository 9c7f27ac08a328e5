"""Emulated devices: they take as long as their profile says, on the average exactly, and hold as much."""

from __future__ import annotations

import dataclasses

import numpy as np
import pytest

from nexusengine.config import parse_device
from nexusengine.errors import ConfigError
from nexusengine.execute import emulated
from nexusengine.execute.base import ExecutorOptions
from nexusengine.execute.batch import StepBatch
from nexusengine.execute.emulated import EmulatedExecutor
from nexusengine.execute.factory import make_executor
from nexusengine.loading.resolve import resolve_model
from nexusengine.profiles.registry import load_profile
from nexusengine.sampling.table import SamplingTable
from nexusengine.tokenize import load_tokenizer


class LateClock:
    """A clock on which every sleep ends late."""

    def __init__(self, late_s: float) -> None:
        self.now_s, self.late_s, self.slept = 100.0, late_s, 0

    def monotonic(self) -> float:
        return self.now_s

    def sleep(self, seconds: float) -> None:
        assert seconds > 0.0
        self.now_s += seconds + self.late_s
        self.slept += 1


def make(device: str, **options: object) -> EmulatedExecutor:
    files = resolve_model("smollm2-135m", weights=False)
    executor = make_executor(files, parse_device(device), ExecutorOptions(**options))  # type: ignore[arg-type]
    assert isinstance(executor, EmulatedExecutor)
    return executor


def batch(counts: list[int], starts: list[int]) -> StepBatch:
    n = len(counts)
    return StepBatch(
        np.arange(n, dtype=np.int32),
        np.array(starts, np.int32),
        np.array(counts, np.int32),
        np.ones(n, np.bool_),
        np.zeros(sum(counts), np.int32),
        np.zeros((n, 4), np.int32),
        SamplingTable.empty(n),
    )


def test_a_device_holds_what_its_profile_holds_whatever_model_is_served() -> None:
    profile = load_profile("h100")
    spec = make("emulated:h100", max_running=4096).spec
    assert (spec.num_blocks - 1) * spec.block_size == profile.identity.kv_capacity_tokens
    assert spec.weights_bytes == profile.identity.weights_bytes
    narrow = make("emulated:h100", max_running=4096, fp8_kv=True, kv_cache_bytes=spec.kv_bytes).spec
    assert (narrow.num_blocks, narrow.kv_dtype) == (2 * spec.num_blocks, "float8_e4m3fn")
    assert make("emulated:h100/qwen3-32b").spec.weights_bytes == load_profile("h100/qwen3-32b").identity.weights_bytes


def test_steps_take_the_time_of_the_profile_with_its_scatter(monkeypatch: pytest.MonkeyPatch) -> None:
    clock = LateClock(0.0)
    monkeypatch.setattr(emulated, "time", clock)
    executor, step = make("emulated:h100"), batch([1] * 32 + [500], [700] * 32 + [0])
    took = []
    for _ in range(2000):
        executor.submit(step)
        took.append(executor.collect().device_s)
    mean = load_profile("h100").step_s(step.counts, step.starts)
    assert executor.step_s(step) == mean
    assert np.mean(took) == pytest.approx(mean, rel=0.01)
    assert np.std(took) > 0.005 * mean
    assert clock.now_s - 100.0 == pytest.approx(sum(took))


def test_lateness_of_sleeping_does_not_add_up(monkeypatch: pytest.MonkeyPatch) -> None:
    clock = LateClock(0.0002)
    monkeypatch.setattr(emulated, "time", clock)
    executor, step, took = make("emulated:h100"), batch([1] * 8, [100] * 8), 0.0
    for _ in range(500):
        executor.submit(step)
        took += executor.collect().device_s
    assert clock.slept == 500
    assert clock.now_s - 100.0 == pytest.approx(took + 0.0002, abs=1e-9)


def test_time_between_steps_is_not_made_up_for(monkeypatch: pytest.MonkeyPatch) -> None:
    clock = LateClock(0.0002)
    monkeypatch.setattr(emulated, "time", clock)
    executor, step, took = make("emulated:h100"), batch([1] * 8, [100] * 8), 0.0
    for _ in range(100):
        executor.submit(step)
        took += executor.collect().device_s
        clock.now_s += 0.003  # the scheduler works
    assert clock.now_s - 100.0 == pytest.approx(took + 100 * 0.003 + 0.0002, abs=1e-9)
    clock.now_s += 10.0  # nobody asks for anything; the next step owes nothing
    executor.submit(step)
    before_s = clock.now_s
    device_s = executor.collect().device_s
    assert clock.now_s - before_s == pytest.approx(device_s + 0.0002)


def test_workers_do_not_scatter_alike_but_each_as_before(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(emulated, "time", LateClock(0.0))

    def took(worker: str) -> list[float]:
        executor, step = make("emulated:h100", worker=worker), batch([1], [100])
        out = []
        for _ in range(5):
            executor.submit(step)
            out.append(executor.collect().device_s)
        return out

    assert took("w0") == took("w0")
    assert took("w0") != took("w1")


def test_tokens_depend_on_seed_and_position_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(emulated, "time", LateClock(0.0))
    tokens = []
    for device in ("emulated:h100", "emulated:l4", "emulated:instant"):
        executor = make(device)
        executor.submit(batch([1, 7], [30, 20]))
        tokens.append(executor.collect().token_ids.tolist())
        assert all(0 < t < executor.spec.vocab_size for t in tokens[-1])
    assert tokens[0] == tokens[1] == tokens[2]


def test_it_makes_up_no_token_that_ends_generation() -> None:
    files = resolve_model("smollm2-135m", weights=False)
    ends = load_tokenizer(files).eos_token_ids
    small = dataclasses.replace(files, config=dataclasses.replace(files.config, vocab_size=max(ends) + 4))
    executor = make_executor(small, parse_device("emulated:instant"), ExecutorOptions())
    executor.submit(batch([1] * 200, list(range(200))))
    tokens = set(executor.collect().token_ids.tolist())
    assert len(tokens) == 3
    assert not tokens & set(ends)


def test_the_instant_device_takes_no_time(monkeypatch: pytest.MonkeyPatch) -> None:
    clock = LateClock(1.0)
    monkeypatch.setattr(emulated, "time", clock)
    executor = make("emulated:instant")
    executor.submit(batch([1], [3]))
    assert executor.collect().device_s == 0.0
    assert clock.slept == 0


def test_steps_are_collected_one_by_one() -> None:
    executor = make("emulated:instant")
    with pytest.raises(RuntimeError, match="no step"):
        executor.collect()
    executor.submit(batch([1], [3]))
    with pytest.raises(RuntimeError, match="in flight"):
        executor.submit(batch([1], [3]))
    executor.close()


def test_an_unknown_device_is_named_with_those_that_are_known() -> None:
    with pytest.raises(ConfigError, match=r"emulated:abacus.*h100.*instant"):
        make("emulated:abacus")
