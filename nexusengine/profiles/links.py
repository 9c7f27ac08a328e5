"""What devices that share a model say to each other, and how long that takes."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Link:
    """A collective between two devices takes latency_s plus its bytes over bytes_per_s."""

    latency_s: float
    bytes_per_s: float

    def seconds(self, size_bytes: float) -> float:
        return self.latency_s + size_bytes / self.bytes_per_s


LINKS: dict[str, Link] = {
    # PCIe 5 without NVLink, as the authors of the runs describe it (config.json: 16 GB/s, 20 us). For comparison, the
    # L40S's all-reduce of two over PCIe 4 was measured at 9.4 GB/s and 5 us (in a CUDA graph) to 43 us (outside).
    "rtxpro6000": Link(20e-6, 16e9),
}
