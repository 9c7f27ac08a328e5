"""The GPUs of this machine as the NVIDIA driver shows them, without torch and without a CUDA context.

Everything answers on a machine without driver or library: with nothing, and a reason where one was asked for.
"""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

_LINKS = {"PIX": 10, "PXB": 20, "PHB": 30, "NODE": 40, "SYS": 50}
"""Levels of NVML's nearest common ancestor, nearest first, by nvidia-smi's names."""


@dataclass(frozen=True, slots=True)
class Gpu:
    """uuid: as CUDA_VISIBLE_DEVICES takes it. numa_node: -1 if the system does not say."""

    uuid: str
    name: str
    total_bytes: int
    free_bytes: int
    compute_capability: tuple[int, int]
    pci: str
    numa_node: int


@dataclass(frozen=True, slots=True)
class GpuState:
    """What a GPU does now; None where the driver does not tell. throttled: why its clock is held down."""

    clock_mhz: float | None
    most_clock_mhz: float | None
    power_w: float | None
    temperature_c: float | None
    used_bytes: float | None
    throttled: tuple[str, ...]

    def counters(self) -> dict[str, float]:
        """By the names under which a worker reports them; without what is not known."""
        found = {
            "gpu_clock_mhz": self.clock_mhz,
            "gpu_most_clock_mhz": self.most_clock_mhz,
            "gpu_power_w": self.power_w,
            "gpu_temperature_c": self.temperature_c,
            "gpu_used_bytes": self.used_bytes,
            "gpu_throttled": float(bool(self.throttled)),
        }
        return {name: value for name, value in found.items() if value is not None}


@contextmanager
def driver() -> Iterator[Any]:
    """The library, initialised; raises what it raises where there is no driver, and ImportError without library."""
    import pynvml

    pynvml.nvmlInit()
    try:
        yield pynvml
    finally:
        pynvml.nvmlShutdown()


def driver_version() -> tuple[str, str]:
    """(version or "", why there is none)."""
    try:
        with driver() as nvml:
            return _text(nvml.nvmlSystemGetDriverVersion()), ""
    except Exception as error:  # no driver, no library, no permission: the reason is the answer
        return "", f"{type(error).__name__}: {error}"


def visible(environ: Mapping[str, str] = os.environ) -> tuple[Gpu, ...]:
    """The GPUs in the order in which `cuda:N` counts them.

    What CUDA_VISIBLE_DEVICES names, else all in the order of the bus; its numbers are taken in the order of the bus
    too. Empty without a driver.
    """
    try:
        with driver() as nvml:
            gpus = [_gpu(nvml, i) for i in range(int(nvml.nvmlDeviceGetCount()))]
    except Exception:  # no driver, no library, no permission: all mean that CUDA is not usable from here
        return ()
    return select(gpus, environ.get("CUDA_VISIBLE_DEVICES"))


def select(gpus: list[Gpu], wanted: str | None) -> tuple[Gpu, ...]:
    """The GPUs that CUDA_VISIBLE_DEVICES leaves.

    It holds numbers or beginnings of UUIDs, and counts up to the first that names none, as CUDA reads it.
    """
    if wanted is None:
        return tuple(gpus)
    found: list[Gpu] = []
    for word in wanted.split(","):
        word = word.strip()
        if word.startswith("MIG-"):
            named = [mig(word)]
        elif word.isdigit():
            named = gpus[int(word) : int(word) + 1]
        else:
            named = [g for g in gpus if word and g.uuid.startswith(word)]
        if len(named) != 1 or named[0] in found:
            break
        found.append(named[0])
    return tuple(found)


def mig(uuid: str) -> Gpu:
    """A slice of a GPU, of which nothing is known but its name."""
    return Gpu(uuid, "MIG slice", 0, 0, (0, 0), "", -1)


def state_of(uuid: str) -> GpuState | None:
    """None without a driver, or where it does not know the device."""
    try:
        with driver() as nvml:
            handle = nvml.nvmlDeviceGetHandleByUUID(uuid)
            return _state(nvml, handle)
    except Exception:  # telemetry is a help; the worker works without
        return None


def link_between(nvml: Any, one: Any, other: Any) -> str:
    """How two GPUs reach each other: NVLink between the two, else the nearest PCIe ancestor, as nvidia-smi names it."""
    try:
        status = nvml.nvmlDeviceGetP2PStatus(one, other, nvml.NVML_P2P_CAPS_INDEX_NVLINK)
        if status == nvml.NVML_P2P_STATUS_OK:
            return "NVLINK"
    except nvml.NVMLError:  # it does not know of such links
        pass
    level = int(nvml.nvmlDeviceGetTopologyCommonAncestor(one, other))
    return next((name for name, value in _LINKS.items() if value >= level), "SYS")


def topology(gpus: tuple[Gpu, ...]) -> list[list[str]]:
    """`[N, N]`: how each GPU reaches each other; empty where the driver does not say."""
    try:
        with driver() as nvml:
            handles = [nvml.nvmlDeviceGetHandleByUUID(g.uuid) for g in gpus]
            return [[("-" if a is b else link_between(nvml, a, b)) for b in handles] for a in handles]
    except Exception:  # no driver, no library, or a question it does not answer: doctor then leaves the table out
        return []


def _gpu(nvml: Any, index: int) -> Gpu:
    handle = nvml.nvmlDeviceGetHandleByIndex(index)
    try:
        memory = nvml.nvmlDeviceGetMemoryInfo(handle)
        total_bytes, free_bytes = int(memory.total), int(memory.free)
    except nvml.NVMLError:  # it shares the host's
        total_bytes = free_bytes = 0
    major, minor = nvml.nvmlDeviceGetCudaComputeCapability(handle)
    pci = _text(nvml.nvmlDeviceGetPciInfo(handle).busId)
    return Gpu(
        _text(nvml.nvmlDeviceGetUUID(handle)), _text(nvml.nvmlDeviceGetName(handle)), total_bytes,
        free_bytes, (int(major), int(minor)), pci, _numa_node(pci),
    )  # fmt: skip


def _numa_node(pci: str) -> int:
    domain, _, rest = pci.lower().partition(":")
    try:
        with open(f"/sys/bus/pci/devices/{domain[-4:]}:{rest}/numa_node") as file:
            return int(file.read())
    except (OSError, ValueError):
        return -1


def _state(nvml: Any, handle: Any) -> GpuState:
    def ask(read: Any) -> float | None:
        try:
            return float(read())
        except Exception:  # not every GPU tells everything
            return None

    reasons = ask(lambda: nvml.nvmlDeviceGetCurrentClocksThrottleReasons(handle))
    named = {
        "power cap": nvml.nvmlClocksThrottleReasonSwPowerCap,
        "hardware slowdown": nvml.nvmlClocksThrottleReasonHwSlowdown,
        "heat": nvml.nvmlClocksThrottleReasonSwThermalSlowdown,
    }
    return GpuState(
        clock_mhz=ask(lambda: nvml.nvmlDeviceGetClockInfo(handle, nvml.NVML_CLOCK_SM)),
        most_clock_mhz=ask(lambda: nvml.nvmlDeviceGetMaxClockInfo(handle, nvml.NVML_CLOCK_SM)),
        power_w=ask(lambda: nvml.nvmlDeviceGetPowerUsage(handle) / 1000),
        temperature_c=ask(lambda: nvml.nvmlDeviceGetTemperature(handle, nvml.NVML_TEMPERATURE_GPU)),
        used_bytes=ask(lambda: nvml.nvmlDeviceGetMemoryInfo(handle).used),
        throttled=tuple(name for name, bit in named.items() if int(reasons or 0) & int(bit)),
    )


def _text(value: Any) -> str:
    return value.decode() if isinstance(value, bytes) else str(value)
