"""The devices that workers run on."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from nexusengine.errors import ConfigError


@dataclass(frozen=True, slots=True)
class DeviceSpec:
    """One device a worker runs on: `cuda:N`, `cpu` or `cpu:THREADS`, `emulated:PROFILE`."""

    kind: Literal["cuda", "cpu", "emulated"]
    index: int | None = None
    threads: int | None = None
    profile: str | None = None

    def __str__(self) -> str:
        suffix = {"cuda": self.index, "cpu": self.threads, "emulated": self.profile}[self.kind]
        return self.kind if suffix is None else f"{self.kind}:{suffix}"


def parse_device(text: str) -> DeviceSpec:
    """Raises ConfigError naming the word that is not a device."""
    kind, colon, rest = text.strip().partition(":")
    if kind == "cpu" and not colon:
        return DeviceSpec("cpu")
    if kind == "cpu" and rest.isdigit() and 1 <= int(rest) <= 1024:
        return DeviceSpec("cpu", threads=int(rest))
    if kind == "cuda" and (not colon or rest.isdigit()):
        return DeviceSpec("cuda", index=int(rest or 0))
    if kind == "emulated" and rest:
        return DeviceSpec("emulated", profile=rest)
    raise ConfigError(
        f"{text!r} is not a device; write cuda:N, cpu, cpu:THREADS or emulated:PROFILE, separated by commas",
        param="devices",
    )


def count_cuda_devices() -> int:
    """GPUs the NVIDIA driver shows and CUDA_VISIBLE_DEVICES does not hide; 0 without a driver. No torch."""
    from nexusengine import nvml as gpus

    return len(gpus.visible())


def parse_devices(text: str) -> tuple[DeviceSpec, ...]:
    """`auto` (every GPU, else the CPU) or a comma-separated list. Raises ConfigError."""
    if text.strip() == "auto":
        gpus = count_cuda_devices()
        return tuple(DeviceSpec("cuda", index=i) for i in range(gpus)) or (DeviceSpec("cpu"),)
    devices = tuple(parse_device(word) for word in text.split(",") if word.strip())
    if not devices:
        raise ConfigError("no device given; write auto, cuda:0, cpu, ...", param="devices")
    twice = sorted({str(d) for d in devices if d.kind == "cuda" and devices.count(d) > 1})
    if twice:
        raise ConfigError(f"{', '.join(twice)} is listed twice; a GPU has one worker", param="devices")
    return devices
