"""A worker's GPU: it sees that one alone, and reports its clock, power, heat and memory."""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Callable, Mapping
from dataclasses import replace

import msgspec

from nexusengine.config import DeviceSpec
from nexusengine.nvml import GpuState, state_of
from nexusengine.wire import WorkerLoad

PINNED = "NEXUSENGINE_PINNED_GPU"
"""In the environment of a worker whose CUDA_VISIBLE_DEVICES names the one GPU it is for."""
_EVERY_S = 1.0
_CLOCK_CHANGE = 0.05
"""Of a clock that is held down, from which on steps may show it."""


def seen_as(device: DeviceSpec, environ: Mapping[str, str]) -> DeviceSpec:
    """The device as torch counts it in this process: a pinned GPU is the only one, and so the first."""
    return replace(device, index=0) if device.kind == "cuda" and environ.get(PINNED) else device


def slowed_or_freed(before: GpuState, now: GpuState) -> str:
    """Why steps may take another time than a moment ago; empty if nothing indicates it.

    Clocks that move while the GPU is not throttled follow the load.
    """
    if now.throttled != before.throttled:
        return f"the GPU is held down by {', '.join(now.throttled) or 'nothing any longer'}"
    if now.throttled and now.clock_mhz and before.clock_mhz:
        change = now.clock_mhz / before.clock_mhz - 1.0
        if abs(change) > _CLOCK_CHANGE:
            power = "" if now.power_w is None else f" at {now.power_w:.0f} W"
            return f"the GPU's clock went from {before.clock_mhz:.0f} to {now.clock_mhz:.0f} MHz{power}"
    return ""


class Telemetry:
    """Reports clock, power, heat and memory of this worker's GPU, once a second at most.

    Reports nothing where the worker has no GPU of its own or the driver says nothing. Read in the thread that reports;
    `take_change` may be called in another.
    """

    def __init__(
        self,
        environ: Mapping[str, str],
        read: Callable[[str], GpuState | None] = state_of,
        now: Callable[[], float] = time.monotonic,
    ) -> None:
        self._uuid = environ.get("CUDA_VISIBLE_DEVICES", "") if environ.get(PINNED) else ""
        self._read, self._now = read, now
        self._read_s = float("-inf")
        self._counters: dict[str, float] = {}
        self._state: GpuState | None = None
        self._changes: deque[str] = deque(maxlen=1)

    def take_change(self) -> str:
        """Why steps may take another time than before, once for each time that this was seen; else empty."""
        try:
            return self._changes.popleft()
        except IndexError:
            return ""

    def beside(self, load: Callable[[], WorkerLoad]) -> Callable[[], WorkerLoad]:
        """`load` with the GPU's numbers among its counters."""
        if not self._uuid:
            return load

        def both() -> WorkerLoad:
            if self._now() - self._read_s >= _EVERY_S:
                state, self._read_s = self._read(self._uuid), self._now()
                self._counters = {} if state is None else state.counters()
                if state is not None and self._state is not None:
                    self._changes.extend(filter(None, [slowed_or_freed(self._state, state)]))
                self._state = state
            found = load()
            return msgspec.structs.replace(found, counters={**found.counters, **self._counters})

        return both
