"""One worker a GPU: which GPU it sees, and what it reports of it. No driver is needed."""

from __future__ import annotations

import sys
from dataclasses import replace
from types import SimpleNamespace

import pytest

from nexusengine import nvml as gpus
from nexusengine.config import DeviceSpec, count_cuda_devices, parse_device
from nexusengine.nvml import Gpu, GpuState
from nexusengine.perf.online import OnlineModel
from nexusengine.supervisor.roles import worker_environ
from nexusengine.wire import WorkerLoad
from nexusengine.worker.gpu import PINNED, Telemetry, seen_as, slowed_or_freed
from nexusengine.worker.worker import apply_telemetry

A = Gpu("GPU-aaaa-1", "H100", 80, 79, (9, 0), "00000000:01:00.0", 0)
B = Gpu("GPU-bbbb-2", "L4", 24, 23, (8, 9), "00000000:02:00.0", 1)


class FakeDriver:
    """The part of pynvml that is asked, for two GPUs."""

    NVMLError = RuntimeError
    NVML_CLOCK_SM, NVML_TEMPERATURE_GPU = 1, 0
    nvmlClocksThrottleReasonSwPowerCap = 4
    nvmlClocksThrottleReasonHwSlowdown = 8
    nvmlClocksThrottleReasonSwThermalSlowdown = 32
    NVML_P2P_CAPS_INDEX_NVLINK, NVML_P2P_STATUS_OK = 2, 0
    gpus: tuple[Gpu, ...] = (A, B)
    linked: tuple[set[Gpu], ...] = ()

    def nvmlInit(self) -> None: ...
    def nvmlShutdown(self) -> None: ...
    def nvmlSystemGetDriverVersion(self) -> bytes:
        return b"580.1"

    def nvmlDeviceGetCount(self) -> int:
        return len(self.gpus)

    def nvmlDeviceGetHandleByIndex(self, index: int) -> Gpu:
        return self.gpus[index]

    def nvmlDeviceGetHandleByUUID(self, uuid: str) -> Gpu:
        return next(g for g in self.gpus if g.uuid == uuid)

    def nvmlDeviceGetUUID(self, gpu: Gpu) -> str:
        return gpu.uuid

    def nvmlDeviceGetName(self, gpu: Gpu) -> bytes:
        return gpu.name.encode()

    def nvmlDeviceGetMemoryInfo(self, gpu: Gpu) -> SimpleNamespace:
        return SimpleNamespace(total=gpu.total_bytes, free=gpu.free_bytes, used=gpu.total_bytes - gpu.free_bytes)

    def nvmlDeviceGetCudaComputeCapability(self, gpu: Gpu) -> tuple[int, int]:
        return gpu.compute_capability

    def nvmlDeviceGetPciInfo(self, gpu: Gpu) -> SimpleNamespace:
        return SimpleNamespace(busId=gpu.pci)

    def nvmlDeviceGetClockInfo(self, gpu: Gpu, kind: int) -> int:
        return 1500

    def nvmlDeviceGetMaxClockInfo(self, gpu: Gpu, kind: int) -> int:
        return 1980

    def nvmlDeviceGetPowerUsage(self, gpu: Gpu) -> int:
        raise RuntimeError("not supported")

    def nvmlDeviceGetTemperature(self, gpu: Gpu, kind: int) -> int:
        return 60

    def nvmlDeviceGetCurrentClocksThrottleReasons(self, gpu: Gpu) -> int:
        return 4 | 1

    def nvmlDeviceGetP2PStatus(self, one: Gpu, other: Gpu, index: int) -> int:
        if index != self.NVML_P2P_CAPS_INDEX_NVLINK or {one, other} not in self.linked:
            raise self.NVMLError("not supported")
        return self.NVML_P2P_STATUS_OK

    def nvmlDeviceGetTopologyCommonAncestor(self, one: Gpu, other: Gpu) -> int:
        return 30


@pytest.fixture
def driver(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "pynvml", FakeDriver())


def test_a_worker_sees_its_gpu_alone_by_uuid_and_as_the_first() -> None:
    environ = worker_environ(parse_device("cuda:1"), (A, B))
    assert environ["CUDA_VISIBLE_DEVICES"] == "GPU-bbbb-2"
    assert seen_as(parse_device("cuda:1"), environ) == DeviceSpec("cuda", index=0)
    assert seen_as(parse_device("cuda:1"), {}) == DeviceSpec("cuda", index=1)


def test_other_devices_and_unknown_gpus_are_not_pinned(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("OMP_WAIT_POLICY", raising=False)
    assert worker_environ(parse_device("cpu:2"), (A,)) == {"OMP_NUM_THREADS": "2", "OMP_WAIT_POLICY": "passive"}
    assert worker_environ(parse_device("cuda:4"), (A,)) == {}
    assert worker_environ(parse_device("emulated:h100"), (A,)) == {}


@pytest.mark.parametrize(
    ("wanted", "found"),
    [
        (None, (A, B)),
        ("1,0", (B, A)),
        ("GPU-b", (B,)),
        ("", ()),
        ("-1", ()),
        ("0,7,1", (A,)),
        ("1,MIG-7", (B, gpus.mig("MIG-7"))),
        ("GPU-", ()),
    ],
)
def test_cuda_visible_devices_is_read_as_cuda_reads_it(wanted: str | None, found: tuple[Gpu, ...]) -> None:
    assert gpus.select([A, B], wanted) == found


@pytest.mark.usefixtures("driver")
def test_gpus_and_links_are_what_the_driver_shows(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    assert [g.uuid for g in gpus.visible()] == [A.uuid, B.uuid]
    assert count_cuda_devices() == 2
    assert gpus.driver_version() == ("580.1", "")
    assert gpus.topology((A, B)) == [["-", "PHB"], ["PHB", "-"]]


def test_nvlink_is_told_of_the_pair_that_has_it_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    third = replace(B, uuid="GPU-cccc-3")
    driver = FakeDriver()
    driver.gpus, driver.linked = (A, B, third), ({A, B},)
    monkeypatch.setitem(sys.modules, "pynvml", driver)
    assert gpus.topology(driver.gpus) == [["-", "NVLINK", "PHB"], ["NVLINK", "-", "PHB"], ["PHB", "PHB", "-"]]


@pytest.mark.usefixtures("driver")
def test_the_state_leaves_out_what_the_gpu_does_not_tell() -> None:
    state = gpus.state_of(A.uuid)
    assert state is not None
    assert state.throttled == ("power cap",)
    assert state.counters() == {
        "gpu_clock_mhz": 1500.0, "gpu_most_clock_mhz": 1980.0, "gpu_temperature_c": 60.0, "gpu_used_bytes": 1.0,
        "gpu_throttled": 1.0,
    }  # fmt: skip


def test_without_a_driver_there_is_nothing_and_a_reason(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "pynvml", None)
    assert gpus.visible() == ()
    assert gpus.state_of(A.uuid) is None
    assert gpus.topology((A,)) == []
    version, reason = gpus.driver_version()
    assert version == ""
    assert "ModuleNotFoundError" in reason


def test_a_gpu_is_asked_once_a_second_and_its_numbers_join_the_worker_s() -> None:
    asked: list[str] = []
    at = [0.0]

    def read(uuid: str) -> GpuState:
        asked.append(uuid)
        return GpuState(1500.0, None, 300.0, None, None, ())

    environ = {"CUDA_VISIBLE_DEVICES": A.uuid, PINNED: "1"}
    load = WorkerLoad(last_dispatch_seq=0, kv_total_blocks=1, counters={"steps": 7.0})
    beside = Telemetry(environ, read, lambda: at[0]).beside(lambda: load)
    assert beside().counters == {"steps": 7.0, "gpu_clock_mhz": 1500.0, "gpu_power_w": 300.0, "gpu_throttled": 0.0}
    beside()
    at[0] = 1.5
    beside()
    assert asked == [A.uuid] * 2


@pytest.mark.parametrize(
    ("before", "now", "words"),
    [
        ((1980, ()), (1500, ()), ""),
        ((1980, ()), (1700, ("power cap",)), "held down by power cap"),
        ((1700, ("power cap",)), (1500, ("power cap", "heat")), "held down by power cap, heat"),
        ((1700, ("power cap",)), (1980, ()), "held down by nothing any longer"),
        ((1700, ("power cap",)), (1690, ("power cap",)), ""),
        ((1700, ("power cap",)), (1500, ("power cap",)), "clock went from 1700 to 1500 MHz at 700 W"),
        ((None, ("heat",)), (1500, ("heat",)), ""),
    ],
)
def test_what_holds_a_clock_down_is_news_and_a_clock_that_follows_the_load_is_not(
    before: tuple[float | None, tuple[str, ...]], now: tuple[float | None, tuple[str, ...]], words: str
) -> None:
    one, other = (GpuState(clock, 1980.0, 700.0, 80.0, None, held) for clock, held in (before, now))
    found = slowed_or_freed(one, other)
    assert words in found
    assert bool(found) == bool(words)


def test_throttling_that_the_driver_tells_lets_the_model_believe_in_slower_steps_sooner(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """From NVML's bits to the model: nothing, then heat, and the model is told once."""
    bits = [0]
    driver = FakeDriver()
    driver.nvmlDeviceGetCurrentClocksThrottleReasons = lambda gpu: bits[0]  # type: ignore[method-assign]
    monkeypatch.setitem(sys.modules, "pynvml", driver)
    at, told = [0.0], []
    environ = {"CUDA_VISIBLE_DEVICES": A.uuid, PINNED: "1"}
    telemetry = Telemetry(environ, now=lambda: at[0])
    report = telemetry.beside(lambda: WorkerLoad(last_dispatch_seq=0, kv_total_blocks=1))

    class Model(OnlineModel):
        def expect_change(self) -> None:
            told.append(at[0])

    model = Model()
    for second, reasons in enumerate([0, 1, 32, 32, 0, 0]):  # 1: the GPU has nothing to do
        at[0], bits[0] = float(second), reasons
        report()
        apply_telemetry(telemetry, model)
        apply_telemetry(telemetry, model)
    assert told == [2.0, 4.0]


def test_a_worker_without_a_gpu_of_its_own_reports_as_before() -> None:
    load = WorkerLoad(last_dispatch_seq=0, kv_total_blocks=1)
    assert Telemetry({"CUDA_VISIBLE_DEVICES": "0"}).beside(lambda: load)() is load
