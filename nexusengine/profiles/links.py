"""How long collectives between devices that share a model take."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from nexusengine.arrays import F8


@dataclass(frozen=True, slots=True)
class Link:
    """Collectives between two devices, as they were measured.

    Linear between the sizes measured, and beyond the last as between the last two.

    Attributes:
        sizes: bytes that are reduced, that each device gives to be gathered, or that each keeps of what was reduced.
        all_reduce_us, all_gather_us, reduce_scatter_us: microseconds, one for each of `sizes`.
    """

    sizes: tuple[float, ...]
    all_reduce_us: tuple[float, ...]
    all_gather_us: tuple[float, ...]
    reduce_scatter_us: tuple[float, ...]

    def all_reduce_s(self, size: F8 | float) -> F8:
        """Seconds of an all-reduce of `size` bytes."""
        return self._seconds(self.all_reduce_us, size)

    def all_gather_s(self, size: F8 | float) -> F8:
        """Seconds of an all-gather to which each device gives `size` bytes."""
        return self._seconds(self.all_gather_us, size)

    def reduce_scatter_s(self, size: F8 | float) -> F8:
        """Seconds of a reduce-scatter of which each device keeps `size` bytes."""
        return self._seconds(self.reduce_scatter_us, size)

    def _seconds(self, times_us: tuple[float, ...], size: F8 | float) -> F8:
        slope = (times_us[-1] - times_us[-2]) / (self.sizes[-1] - self.sizes[-2])
        beyond = np.maximum(np.asarray(size) - self.sizes[-1], 0.0)
        seconds: F8 = 1e-6 * (np.interp(size, self.sizes, times_us) + slope * beyond)
        return seconds


LINKS: dict[str, Link] = {
    # Two of these cards on PCIe 5 without NVLink, NCCL in CUDA graphs, bf16: profiler/perf/RTXPRO6000/hardware.yaml of
    # LLMServingSim at e08dc388 (MIT, KAIST CASYS), measured 2026-09-08. Later that month, with PCIe access control
    # switched off, the same machine took half as long for all but small messages: this is the machine as it was before.
    "rtxpro6000": Link(
        (10240, 40960, 139264, 327680, 557056, 1114112, 1310720, 2228224, 5242880, 8912896, 16777216, 20971520),
        (16.24, 17.5, 22.78, 30.6, 42.64, 78.36, 90.59, 148.95, 335.41, 566.73, 1051.83, 1309.13),
        (14.52, 16.44, 20.15, 30.36, 46.12, 84.1, 95.45, 154.57, 352.81, 589.39, 1093.41, 1362.23),
        (13.45, 15.68, 20.96, 32.81, 48.59, 86.98, 100.54, 161.63, 378.89, 639.52, 1136.82, 1405.58),
    ),
}
