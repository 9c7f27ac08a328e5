"""Where a device's memory goes. No torch."""

from __future__ import annotations

from dataclasses import asdict, dataclass

_GRAPHS_SHARE, _GRAPHS_MOST_BYTES = 1 / 32, 2 * 2**30
RESERVE_SHARE = 0.1
"""Of a GPU's memory, left for fragmentation and whatever else uses the device."""


@dataclass(frozen=True, slots=True)
class MemoryLedger:
    """Bytes. activations: the measured peak of the largest step beyond the weights (not known on a CPU: 0). graphs: set
    aside for CUDA graphs. reserve: left alone. other: in use before, or by others."""

    total: int
    weights: int
    activations: int
    graphs: int
    kv: int
    reserve: int
    other: int = 0

    @property
    def unused(self) -> int:
        """What nobody claims; negative if the parts are more than there is."""
        return self.total - self.weights - self.activations - self.graphs - self.kv - self.reserve - self.other

    def as_dict(self) -> dict[str, int]:
        return {**asdict(self), "unused": self.unused}

    def text(self) -> str:
        parts = ", ".join(f"{name} {size / 2**30:.2f}" for name, size in self.as_dict().items() if name != "total")
        return f"{self.total / 2**30:.2f} GiB: {parts}"


def graph_budget_bytes(total_bytes: int) -> int:
    """A thirty-second of the device, at most 2 GiB."""
    return min(int(total_bytes * _GRAPHS_SHARE), _GRAPHS_MOST_BYTES)
