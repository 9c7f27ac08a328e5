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
    # PCIe 5 without NVLink: what aiconfigurator measured of an all-reduce between two L40S over PCIe 4 in a CUDA graph
    # (5.2 us, 9.4 GB/s), at twice the bandwidth. Not measured on this device.
    "rtxpro6000": Link(5.2e-6, 2 * 9.4e9),
}
