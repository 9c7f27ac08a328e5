"""What a worker has learned of its step times survives its restart, and no file of it can hurt."""

from __future__ import annotations

import dataclasses
import errno
import logging
import math
import os
import random
import threading
import time
from collections.abc import Callable
from pathlib import Path

import msgspec
import numpy as np
import pytest

from nexusengine.clock import VirtualClock
from nexusengine.config import EngineConfig
from nexusengine.errors import ConfigError
from nexusengine.execute.base import ExecutorSpec
from nexusengine.model_config import ModelConfig
from nexusengine.perf.features import StepFeatures
from nexusengine.perf.online import OnlineModel
from nexusengine.perf.prior import EIGHT_BILLION, GENERIC
from nexusengine.perf.state import ModelState
from nexusengine.worker.build import make_core, store_of
from nexusengine.worker.model_store import ModelStore, Remembered, SavedModel, Saver, folder_of, kind_of, processor
from nexusengine.worker.resume import Measured, resumed
from tests.support.devices import Roofline, random_step
from tests.support.fakes import FakeExecutor

DEVICE = Roofline()
KIND = {"device": "NVIDIA L4", "model": "m"}
DAY_S = 86_400.0
NOW_S = 1.8e9
DECODES = StepFeatures(16, 16, 0, 0.0, 16 * 800)
PROMPT = StepFeatures(512, 1, 1, 512 * 256.0, 0)


def taught(steps: int = 600, slower: float = 1.0, seed: int = 1) -> OnlineModel:
    rng, model = random.Random(seed), OnlineModel()
    for _ in range(steps):
        step = random_step(rng)
        model.observe(step, slower * DEVICE.step_s(step) * rng.lognormvariate(0.0, 0.02))
    return model


def calibration(slower: float = 1.0, noise: float = 0.05, seed: int = 5) -> list[Measured]:
    rng = random.Random(seed)
    steps = [StepFeatures(n, n, 0, 0.0, 128 * n) for n in (1, 4, 8, 16, 32, 64)] * 2
    steps += [StepFeatures(q, 1, 1, q * q / 2, 0) for q in (16, 64, 128, 256)] * 2
    return [(s, slower * DEVICE.step_s(s) * rng.lognormvariate(0.0, noise)) for s in steps]


def mean_error(model: OnlineModel, slower: float = 1.0) -> float:
    rng = random.Random(99)
    steps = [random_step(rng) for _ in range(300)]
    return sum(abs(model.predict(s).mean_s / (slower * DEVICE.step_s(s)) - 1.0) for s in steps) / len(steps)


def store(folder: Path, kind: dict[str, str] = KIND, now_s: float = NOW_S) -> ModelStore:
    return ModelStore(folder, kind, lambda: now_s)


# ---- what is kept ----------------------------------------------------------------------------------------------------


def test_a_model_that_is_resumed_predicts_as_the_one_before_it(tmp_path: Path) -> None:
    before = taught()
    store(tmp_path).save(before.state())
    remembered = store(tmp_path).load()
    assert remembered is not None
    assert remembered.freshness == 1.0
    after = resumed(remembered, GENERIC, [])
    assert after is not None
    assert mean_error(after) < 0.02 < mean_error(OnlineModel())
    for step in (DECODES, PROMPT, StepFeatures(4000, 1, 1, 4000 * 2000.0, 0)):
        assert after.predict(step).mean_s == pytest.approx(before.predict(step).mean_s, rel=0.05)


def test_what_calibration_did_not_reach_is_known_too(tmp_path: Path) -> None:
    fresh, long = OnlineModel(), StepFeatures(32, 32, 0, 0.0, 32 * 1900)
    for step, seconds in calibration():
        fresh.observe(step, seconds)
    after = resumed(Remembered(taught().state(), 1.0), GENERIC, calibration())
    assert after is not None
    assert mean_error(after) < 0.5 * mean_error(fresh)
    assert after.predict(long).mean_s == pytest.approx(DEVICE.step_s(long), rel=0.05)


@pytest.mark.parametrize("slower", [0.5, 1.3, 2.5])
def test_a_device_that_is_slower_than_before_is_taken_at_its_new_speed_at_once(slower: float) -> None:
    after = resumed(Remembered(taught().state(), 1.0), GENERIC, calibration(slower))
    assert after is not None
    assert mean_error(after, slower) < 0.05


def test_new_steps_soon_prevail_over_what_was_kept_and_sooner_over_what_is_old() -> None:
    state, errors = taught().state(), []
    for freshness in (1.0, 0.05):
        after = resumed(Remembered(state, freshness), GENERIC, [])
        assert after is not None
        rng = random.Random(3)
        for _ in range(60):
            step = random_step(rng)
            after.observe(step, 1.08 * DEVICE.step_s(step))  # too little to be taken for a change of the device
        errors.append(mean_error(after, slower=1.08))
    assert errors[1] < errors[0] < 0.06


def test_a_file_counts_half_after_two_days_and_little_after_ten(tmp_path: Path) -> None:
    store(tmp_path).save(taught(100).state())
    freshness = []
    for days in (0, 2, 10, -0.5):
        remembered = store(tmp_path, now_s=NOW_S + days * DAY_S).load()
        assert remembered is not None
        freshness.append(remembered.freshness)
    assert freshness == pytest.approx([1.0, 0.5, 0.03125, 1.0])
    assert store(tmp_path, now_s=NOW_S + 61 * DAY_S).load() is None
    assert store(tmp_path, now_s=NOW_S - 2 * DAY_S).load() is None


def test_a_state_that_was_resumed_and_saved_again_and_again_is_not_worn_out(tmp_path: Path) -> None:
    model: OnlineModel | None = taught()
    for _ in range(5):
        assert model is not None
        store(tmp_path).save(model.state())
        remembered = store(tmp_path).load()
        assert remembered is not None
        model = resumed(remembered, GENERIC, calibration())
    assert model is not None
    assert mean_error(model) < 0.03


# ---- what is not believed --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("slower", [0.2, 5.0, 30.0])
def test_a_state_that_calibration_contradicts_is_not_used_and_that_is_logged(
    slower: float, caplog: pytest.LogCaptureFixture
) -> None:
    with caplog.at_level(logging.INFO):
        assert resumed(Remembered(taught().state(), 1.0), GENERIC, calibration(slower)) is None
    assert len(caplog.records) == 1
    assert "times as long as it says" in caplog.text


def test_a_state_right_at_the_median_but_of_another_shape_is_not_used() -> None:
    odd = [(step, seconds * (5.0 if i % 3 == 0 else 1.0)) for i, (step, seconds) in enumerate(calibration())]
    assert resumed(Remembered(taught().state(), 1.0), GENERIC, odd) is None


def _arrays(change: Callable[[np.ndarray], None]) -> Callable[[ModelState], ModelState]:
    def spoil(state: ModelState) -> ModelState:
        gram = np.frombuffer(state.gram, "<f8").copy()
        change(gram)
        return msgspec.structs.replace(state, gram=gram.tobytes())

    return spoil


def _put(at: int, value: float) -> Callable[[ModelState], ModelState]:
    return _arrays(lambda gram: gram.__setitem__(at, value))


@pytest.mark.parametrize(
    "spoil",
    [
        _put(0, math.nan),
        _put(0, math.inf),
        _put(0, -1.0),
        _put(1, 1e12),
        _put(0, 1e300),
        lambda s: msgspec.structs.replace(s, gram=s.gram[:-8]),
        lambda s: msgspec.structs.replace(s, moment=b""),
        lambda s: msgspec.structs.replace(s, seen=s.seen[:-1]),
        lambda s: msgspec.structs.replace(s, tokens_seen=math.nan),
        lambda s: msgspec.structs.replace(s, tokens_seen=0.0),
        lambda s: msgspec.structs.replace(s, log_scales=(math.inf, 0.0)),
        lambda s: msgspec.structs.replace(s, log_scales=(500.0, 0.0)),
        lambda s: msgspec.structs.replace(s, basis="other terms"),
    ],
)
def test_a_state_that_cannot_be_is_not_used_and_changes_nothing(
    spoil: Callable[[ModelState], ModelState], caplog: pytest.LogCaptureFixture
) -> None:
    state = spoil(taught(50).state())
    model, before = OnlineModel(), OnlineModel().snapshot()
    with pytest.raises(ValueError, match=r"."):
        model.resume(state, 32.0)
    assert model.snapshot() == before
    with caplog.at_level(logging.INFO):
        assert resumed(Remembered(state, 1.0), GENERIC, calibration()) is None
    assert len(caplog.records) == 1


def test_a_file_cut_off_or_altered_anywhere_hurts_nobody(tmp_path: Path) -> None:
    kept = store(tmp_path)
    kept.save(taught(200).state())
    whole, rng = kept.path.read_bytes(), random.Random(7)
    for _ in range(120):
        content = bytearray(whole)
        if rng.random() < 0.3:
            del content[rng.randrange(len(content)) :]
        for _ in range(rng.choice((0, 1, 20))):
            if content:
                content[rng.randrange(len(content))] = rng.randrange(256)
        kept.path.write_bytes(content)
        remembered = kept.load()
        model = None if remembered is None else resumed(remembered, GENERIC, calibration())
        if model is not None:
            assert mean_error(model) < 0.5
            assert math.isfinite(model.predict(PROMPT).upper_s)


@pytest.mark.parametrize("content", [b"", b"{}", b"\x80", os.urandom(50_000), b"\x00" * 100, b"x" * (2**20 + 1)])
def test_a_file_of_something_else_is_passed_over_with_one_line(
    content: bytes, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    kept = store(tmp_path)
    kept.path.write_bytes(content)
    with caplog.at_level(logging.INFO):
        assert kept.load() is None
    assert len(caplog.records) == 1
    assert str(kept.path) in caplog.text


def test_a_file_of_another_kind_of_worker_under_this_ones_name_is_passed_over(tmp_path: Path) -> None:
    other = store(tmp_path, {**KIND, "model": "other"})
    other.save(taught(50).state())
    assert other.path != store(tmp_path).path
    other.path.replace(store(tmp_path).path)
    assert store(tmp_path).load() is None


@pytest.mark.parametrize("make", [os.mkdir, os.mkfifo], ids=["folder", "pipe"])
def test_what_is_no_file_is_passed_over(make: Callable[[Path], None], tmp_path: Path) -> None:
    make(store(tmp_path).path)
    assert store(tmp_path).load() is None


@pytest.mark.skipif(os.geteuid() == 0, reason="root may read everything")
def test_a_file_that_must_not_be_read_is_passed_over(tmp_path: Path) -> None:
    store(tmp_path).save(taught(50).state())
    store(tmp_path).path.chmod(0)
    assert store(tmp_path).load() is None


# ---- saving ----------------------------------------------------------------------------------------------------------


def test_a_file_is_replaced_whole_and_leaves_nothing_beside_it(tmp_path: Path) -> None:
    kept = store(tmp_path / "deep" / "folder")
    for steps in (50, 100):
        kept.save(taught(steps).state())
    assert [p.name for p in kept.path.parent.iterdir()] == [kept.path.name]
    assert msgspec.msgpack.decode(kept.path.read_bytes(), type=SavedModel).state.steps == 100
    assert kept.path.stat().st_size < 100_000


def test_what_a_killed_writer_left_is_removed_after_an_hour_and_not_before(tmp_path: Path) -> None:
    kept = ModelStore(tmp_path, KIND)
    old, new = (kept.path.with_suffix(f".{pid}-1.part") for pid in (77, 78))
    old.write_bytes(b"half")
    new.write_bytes(b"half")
    os.utime(old, (time.time() - 7200,) * 2)
    assert kept.load() is None
    assert not old.exists()
    assert new.exists()


def test_when_the_disk_is_full_the_old_file_stays(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    kept = store(tmp_path)
    kept.save(taught(50).state())

    def full(self: Path, target: Path) -> Path:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(Path, "replace", full)
    with pytest.raises(OSError, match="No space left"):
        kept.save(taught(100).state())
    assert [p.name for p in tmp_path.iterdir()] == [kept.path.name]
    remembered = kept.load()
    assert remembered is not None
    assert remembered.state.steps == 50


def test_the_state_is_written_after_five_seconds_and_then_every_thirty_while_there_are_new_steps(
    tmp_path: Path,
) -> None:
    clock, model, saves = VirtualClock(), OnlineModel(), []
    written = threading.Event()

    class Spy(ModelStore):
        def save(self, state: ModelState) -> None:
            saves.append((round(clock.now()), state.steps))
            super().save(state)
            written.set()

    saver = Saver(Spy(tmp_path, KIND), model, clock.now)
    for second in range(120):
        saver.tick()
        clock.advance(1.0)
        if second < 70:
            for _ in range(10):
                model.observe(DECODES, DEVICE.step_s(DECODES))
        if second in (5, 35, 65):
            assert written.wait(10.0)
            written.clear()
    assert [steps for _, steps in saves] == [50, 350, 650]
    remembered = store(tmp_path, now_s=time.time()).load()
    assert remembered is not None


def test_a_folder_that_cannot_be_written_costs_one_warning(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    (tmp_path / "file").write_text("no folder")
    clock, model = VirtualClock(), taught(100)
    saver = Saver(store(tmp_path / "file" / "below"), model, clock.now)
    for _ in range(4):
        clock.advance(40.0)
        for _ in range(40):
            model.observe(DECODES, DEVICE.step_s(DECODES))
        saver.tick()
        if saver._thread is not None:
            saver._thread.join(10.0)
            assert not saver._thread.is_alive()
    assert len(caplog.records) == 1
    assert "cannot keep step times" in caplog.text


# ---- which file ------------------------------------------------------------------------------------------------------


def spec(**changes: object) -> ExecutorSpec:
    plain = ExecutorSpec("cuda:0", "bfloat16", 16, 10, 64, 64, 100, "fa2", 10**9, 0, device_name="NVIDIA L4")
    return dataclasses.replace(plain, **changes)  # type: ignore[arg-type]


def test_gpus_of_one_type_share_a_file_and_whatever_changes_step_times_has_its_own(tmp_path: Path) -> None:
    def path(s: ExecutorSpec, geometry: ModelConfig = EIGHT_BILLION, eager: bool = False) -> Path:
        return ModelStore(tmp_path, kind_of(s, geometry, GENERIC, eager=eager)).path

    assert path(spec(device="cuda:1")) == path(spec())
    others = [
        path(spec(device_name="NVIDIA L40S")),
        path(spec(dtype="float16")),
        path(spec(kv_dtype="float8_e4m3fn")),
        path(spec(weights_bytes=10**8)),
        path(spec(attention_backend="torch")),
        path(spec(device="cpu:2", device_name="")),
        path(spec(device="cpu:1", device_name="")),
        path(spec(), dataclasses.replace(EIGHT_BILLION, num_layers=16)),
        path(spec(), eager=True),
    ]
    assert len({path(spec()), *others}) == len(others) + 1


def test_the_folder_is_the_setting_or_in_the_cache_or_none(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("NEXUSENGINE_CACHE", str(tmp_path))
    assert folder_of(None) == tmp_path / "step-times"
    assert folder_of("/x/y") == Path("/x/y")
    assert folder_of("none") is None
    assert store_of(EngineConfig(step_times="none"), spec(), EIGHT_BILLION) is None
    assert store_of(EngineConfig(), spec(device="emulated:l4"), EIGHT_BILLION) is None
    assert store_of(EngineConfig(), spec(), EIGHT_BILLION) is not None


def test_without_a_home_folder_nothing_is_kept_and_the_worker_starts(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def homeless() -> Path:
        raise RuntimeError("Could not determine home directory.")

    for name in ("NEXUSENGINE_CACHE", "XDG_CACHE_HOME"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr(Path, "home", staticmethod(homeless))
    with caplog.at_level(logging.INFO):
        assert folder_of(None) is None
    assert "no home folder" in caplog.text


def test_a_folder_of_a_user_who_is_not_known_is_refused() -> None:
    with pytest.raises(ConfigError, match=r"step_times is '~nobody-here/x'"):
        folder_of("~nobody-here/x")


def test_a_processor_is_called_as_the_kernel_calls_it(tmp_path: Path) -> None:
    info = tmp_path / "cpuinfo"
    info.write_text("processor\t: 0\nmodel name\t: Some CPU @ 2 GHz\n")
    assert processor(info) == "Some CPU @ 2 GHz"
    assert processor(tmp_path / "none") == "cpu"


# ---- a worker --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("calibrate", [False, True])
def test_a_core_begins_with_what_was_kept(calibrate: bool, tmp_path: Path) -> None:
    executor = FakeExecutor(num_blocks=400, max_model_len=512)
    executor.cache[:] = 5  # what calibration reads was written by nobody
    config = EngineConfig(max_running=8, max_waiting=8, calibrate=calibrate)
    first = make_core(executor, config, VirtualClock()).scheduler.model
    assert isinstance(first, OnlineModel)
    for _ in range(100):
        first.observe(DECODES, 0.01)
    kept = ModelStore(tmp_path, KIND)
    kept.save(first.state())
    second = make_core(executor, config, VirtualClock(), store=kept).scheduler.model
    assert second.predict(DECODES).mean_s == pytest.approx(first.predict(DECODES).mean_s, rel=0.1)


def test_another_performance_model_than_the_online_one_is_made_without_the_file(tmp_path: Path) -> None:
    config = EngineConfig(max_running=8, max_waiting=8, calibrate=False, performance_model="line")
    kept = ModelStore(tmp_path, KIND)
    kept.save(taught(50).state())
    core = make_core(FakeExecutor(), config, VirtualClock(), store=kept)
    assert not isinstance(core.scheduler.model, OnlineModel)
