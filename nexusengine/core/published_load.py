"""The load of an engine core as other threads see it."""

from __future__ import annotations

from collections.abc import Callable

import msgspec

from nexusengine.wire import WorkerLoad

_PUBLISH_EVERY_S = 0.02


class PublishedLoad:
    """The newest picture, replaced in one assignment, so that a reader in another thread never sees half of one."""

    def __init__(self, kv_total_blocks: int) -> None:
        self._load = WorkerLoad(last_dispatch_seq=0, kv_total_blocks=kv_total_blocks)
        self._published_s = float("-inf")
        self._step_started_s: float | None = None

    def publish(self, load: Callable[[], WorkerLoad], now: float, *, force: bool) -> None:
        """load: makes the picture; it is asked for at most every 20 ms unless it must be."""
        if force or now - self._published_s >= _PUBLISH_EVERY_S:
            self._published_s = now
            self._load = load()

    def step_planned(self, number: int, upper_s: float) -> None:
        self._load = msgspec.structs.replace(self._load, step=number, step_upper_s=upper_s)

    def step_started(self, at_s: float | None) -> None:
        """The timestamp at which the oldest step in flight began; None: there is none."""
        self._step_started_s = at_s

    def read(self, now: float) -> WorkerLoad:
        load, started_s = self._load, self._step_started_s
        return msgspec.structs.replace(load, step_running_s=0.0 if started_s is None else max(now - started_s, 0.0))
