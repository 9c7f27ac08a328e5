"""Datasheet figures of devices (dense bfloat16; float16 where a device has no bfloat16): priors, not measurements."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Datasheet:
    """memory_gb: 10^9 bytes; bandwidth_gb_s: of that memory; tflops: 10^12 multiply-adds counted as two."""

    memory_gb: float
    bandwidth_gb_s: float
    tflops: float


DATASHEETS: dict[str, Datasheet] = {
    "t4": Datasheet(16, 320, 65),
    "a10": Datasheet(24, 600, 125),
    "l4": Datasheet(24, 300, 121),
    "a6000": Datasheet(48, 768, 155),
    "l40s": Datasheet(48, 864, 362),
    "rtx4090": Datasheet(24, 1008, 165),
    "a100-40": Datasheet(40, 1555, 312),
    "a100": Datasheet(80, 2039, 312),
    "h100-pcie": Datasheet(80, 2000, 756),
    "h100": Datasheet(80, 3350, 989),
    "h200": Datasheet(141, 4800, 989),
    "b200": Datasheet(180, 8000, 2250),
}
