"""Figures of devices (dense bfloat16; float16 where a device has no bfloat16): priors of step times.

From datasheets; of a GPU whose name is not known here, from what its driver says of its cores, clocks and memory bus.
"""

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
        sustained_tflops: what the matrix products of a layer of Llama-3.1-8B reach in the largest steps that were
            measured (2,048 or 8,192 tokens; the kernels in profiles/data); 0 where none were.
    """

    bandwidth_gb_s: float
    tflops: float
    sustained_tflops: float = 0.0


DATASHEETS: dict[str, Datasheet] = {
    "t4": Datasheet(320, 65),
    "v100": Datasheet(900, 125),
    "a10": Datasheet(600, 125),
    "a30": Datasheet(933, 165),
    "a40": Datasheet(696, 150),
    "l4": Datasheet(300, 121),
    "a6000": Datasheet(768, 155),
    "rtx6000-ada": Datasheet(960, 364),
    "l40s": Datasheet(864, 362, 207),
    "rtx3090": Datasheet(936, 71),
    "rtx4090": Datasheet(1008, 165, 158),
    "rtx5090": Datasheet(1792, 210),
    "rtxpro6000": Datasheet(1792, 503, 370),
    "a100-40": Datasheet(1555, 312, 233),
    "a100": Datasheet(2039, 312, 233),
    "h100-pcie": Datasheet(2000, 756),
    "h100-nvl": Datasheet(3938, 835),
    "h100": Datasheet(3350, 989, 610),
    "h200": Datasheet(4800, 989, 630),
    "gh200": Datasheet(4000, 989, 610),
    "b200": Datasheet(8000, 2250, 1280),
}

_OPERATIONS = {(7, 0): 1024, (7, 5): 1024, (8, 0): 2048, (8, 6): 1024, (8, 9): 1024, (9, 0): 4096, (10, 0): 8192}
"""Multiply-adds counted as two in a clock and multiprocessor, by compute capability."""
_OPERATIONS_OF_OTHERS = 1024
_CORES_PER_MULTIPROCESSOR = {(7, 0): 64, (7, 5): 64, (8, 0): 64}
_CORES_OF_OTHERS = 128


def datasheet_of(device_name: str) -> Datasheet | None:
    """By the name a driver gives, such as `NVIDIA A100-SXM4-80GB`; None if it is not in the table."""
    words = re.sub(r"[^a-z0-9]+", " ", device_name.lower()).split()
    words += ["".join(joined) for joined in (*pairwise(words), *zip(words, words[1:], words[2:], strict=False))]
    words += ["a10"] * ("a10g" in words)
    if "40gb" in words and "a100" in words:
        return DATASHEETS["a100-40"]
    known = [name for name in DATASHEETS if set(name.split("-")) <= set(words)]
    return DATASHEETS[max(known, key=len)] if known else None


@dataclass(frozen=True, slots=True)
class Hardware:
    """What the driver says of a GPU.

    Attributes:
        cores: CUDA cores.
        compute_capability: major and minor.
        core_mhz: highest clock of the cores.
        memory_mhz: highest clock of the memory, which moves data twice in it.
        memory_bus_bits: width of its bus.
        consumer: a GeForce, whose tensor cores add in float32 at half the rate.
    """

    cores: int
    compute_capability: tuple[int, int]
    core_mhz: float
    memory_mhz: float
    memory_bus_bits: int
    consumer: bool = False


def datasheet_from(hardware: Hardware) -> Datasheet | None:
    """The figures that follow from cores, clocks and bus; None where the driver leaves one of them at zero."""
    h = hardware
    processors = h.cores // _CORES_PER_MULTIPROCESSOR.get(h.compute_capability, _CORES_OF_OTHERS)
    operations = _OPERATIONS.get(h.compute_capability, _OPERATIONS_OF_OTHERS) / (1 + h.consumer)
    tflops = processors * operations * h.core_mhz / 1e6
    bandwidth_gb_s = 2 * h.memory_mhz * h.memory_bus_bits / 8 / 1e3
    return Datasheet(bandwidth_gb_s, tflops) if tflops > 0.0 and bandwidth_gb_s > 0.0 else None


def cpu_datasheet(threads: int) -> Datasheet:
    """An order of magnitude: what a core of a server does in float32, and two channels of its memory."""
    return Datasheet(bandwidth_gb_s=20, tflops=0.05 * threads)
