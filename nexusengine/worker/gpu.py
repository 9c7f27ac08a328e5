"""What a worker on a GPU does beside computing: it sees its GPU alone, and reports how that GPU is doing."""

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
    """Why steps may take another time than a moment ago; empty if nothing speaks for it. Clocks that move while nothing
    holds them down go with the load."""
    if now.throttled != before.throttled:
        return f"the GPU is held down by {', '.join(now.throttled) or 'nothing any longer'}"
    if now.throttled and now.clock_mhz and before.clock_mhz:
        change = now.clock_mhz / before.clock_mhz - 1.0
        if abs(change) > _CLOCK_CHANGE:
            power = "" if now.power_w is None else f" at {now.power_w:.0f} W"
            return f"the GPU's clock went from {before.clock_mhz:.0f} to {now.clock_mhz:.0f} MHz{power}"
    return ""


class Telemetry:
    """Clock, power, heat and memory of this worker's GPU among what it reports, once a second at most. Silent where the
    worker has no GPU of its own or the driver tells nothing. Read in the thread that reports; `news` may be asked for
    in another."""

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
        self._news: deque[str] = deque(maxlen=1)

    def news(self) -> str:
        """Why steps may take another time than before, once for each time that this was seen; else empty."""
        try:
            return self._news.popleft()
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
                    self._news.extend(filter(None, [slowed_or_freed(self._state, state)]))
                self._state = state
            found = load()
            return msgspec.structs.replace(found, counters={**found.counters, **self._counters})

        return both
