"""What a worker on a GPU does beside computing: it sees its GPU alone, and reports how that GPU is doing."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from dataclasses import replace

import msgspec

from nexusengine.config import DeviceSpec
from nexusengine.gpus import GpuState, state_of
from nexusengine.wire import WorkerLoad

PINNED = "NEXUSENGINE_PINNED_GPU"
"""In the environment of a worker whose CUDA_VISIBLE_DEVICES names the one GPU it is for."""
_EVERY_S = 1.0


def seen_as(device: DeviceSpec, environ: Mapping[str, str]) -> DeviceSpec:
    """The device as torch counts it in this process: a pinned GPU is the only one, and so the first."""
    return replace(device, index=0) if device.kind == "cuda" and environ.get(PINNED) else device


class Telemetry:
    """Clock, power, heat and memory of this worker's GPU among what it reports, once a second at most. Silent where the
    worker has no GPU of its own or the driver tells nothing."""

    def __init__(
        self,
        environ: Mapping[str, str],
        read: Callable[[str], GpuState | None] = state_of,
        now: Callable[[], float] = time.monotonic,
    ) -> None:
        self._uuid = environ.get("CUDA_VISIBLE_DEVICES", "") if environ.get(PINNED) else ""
        self._read, self._now = read, now
        self._read_s = float("-inf")
        self._totals: dict[str, float] = {}

    def beside(self, load: Callable[[], WorkerLoad]) -> Callable[[], WorkerLoad]:
        """`load` with the GPU's numbers among its totals."""
        if not self._uuid:
            return load

        def both() -> WorkerLoad:
            if self._now() - self._read_s >= _EVERY_S:
                state, self._read_s = self._read(self._uuid), self._now()
                self._totals = {} if state is None else state.totals()
            found = load()
            return msgspec.structs.replace(found, totals={**found.totals, **self._totals})

        return both
