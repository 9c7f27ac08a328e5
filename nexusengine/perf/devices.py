"""Datasheet figures of devices (dense bfloat16; float16 where a device has no bfloat16): priors, not measurements."""

from __future__ import annotations

import re
from dataclasses import dataclass
from itertools import pairwise


@dataclass(frozen=True, slots=True)
class Datasheet:
    """Figures of a device.

    Attributes:
        bandwidth_gb_s: of its memory, in 10^9 bytes.
        tflops: 10^12 multiply-adds counted as two.
    """

    bandwidth_gb_s: float
    tflops: float


DATASHEETS: dict[str, Datasheet] = {
    "t4": Datasheet(320, 65),
    "a10": Datasheet(600, 125),
    "l4": Datasheet(300, 121),
    "a6000": Datasheet(768, 155),
    "l40s": Datasheet(864, 362),
    "rtx4090": Datasheet(1008, 165),
    "a100-40": Datasheet(1555, 312),
    "a100": Datasheet(2039, 312),
    "h100-pcie": Datasheet(2000, 756),
    "h100": Datasheet(3350, 989),
    "h200": Datasheet(4800, 989),
    "b200": Datasheet(8000, 2250),
}


def datasheet_of(device_name: str) -> Datasheet | None:
    """By the name a driver gives, such as `NVIDIA A100-SXM4-80GB`; None if it is not in the table."""
    words = re.sub(r"[^a-z0-9]+", " ", device_name.lower()).split()
    words += [first + second for first, second in pairwise(words)] + ["a10"] * ("a10g" in words)
    if "40gb" in words and "a100" in words:
        return DATASHEETS["a100-40"]
    known = [name for name in DATASHEETS if set(name.split("-")) <= set(words)]
    return DATASHEETS[max(known, key=len)] if known else None


def cpu_datasheet(threads: int) -> Datasheet:
    """An order of magnitude: what a core of a server does in float32, and two channels of its memory."""
    return Datasheet(bandwidth_gb_s=20, tflops=0.05 * threads)
