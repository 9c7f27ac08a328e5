"""Some steps of every worker, for the trace: how long they really took, against what its worker had learned."""

from __future__ import annotations

import asyncio
import contextlib
import random
import threading
from collections.abc import Awaitable, Callable, Iterable

from nexusengine.errors import NexusError
from nexusengine.recording.format import Step
from nexusengine.wire import DebugReply, StepRecord

_EVERY_S, _ASKED, _KEPT = 5.0, 64, 256


class StepSamples:
    """At most 256 steps of each worker between two calls of `take`, drawn evenly of those that were seen.

    Args:
        began_s: monotonic timestamp from which the times of steps count.
    """

    def __init__(self, began_s: float) -> None:
        self._began_s = began_s
        self._lock = threading.Lock()
        self._random = random.Random(0)
        self._kept: dict[str, list[Step]] = {}
        self._seen: dict[str, int] = {}
        self._newest_s: dict[str, float] = {}

    async def watch(self, ask: Callable[[int], Awaitable[Iterable[DebugReply]]], busy: Callable[[], bool]) -> None:
        """Ask the workers for their newest steps every five seconds while requests are served; never returns.

        Args:
            ask: for the newest steps of every worker, so many.
        """
        while True:
            await asyncio.sleep(_EVERY_S)
            if busy():
                await self.look(ask)

    async def look(self, ask: Callable[[int], Awaitable[Iterable[DebugReply]]]) -> None:
        """Ask once. A worker that does not answer is asked the next time."""
        with contextlib.suppress(NexusError):
            for reply in await ask(_ASKED):
                self.add(reply.worker_id, reply.steps)

    def add(self, worker: str, steps: Iterable[StepRecord]) -> None:
        """Note those of `steps` that are newer than any before."""
        newest_s = self._newest_s.get(worker, float("-inf"))
        with self._lock:
            for step in steps:
                if step.started_s <= newest_s or not step.device_s > 0.0:
                    continue
                self._newest_s[worker] = max(self._newest_s.get(worker, step.started_s), step.started_s)
                self._keep(worker, _sample(step, self._began_s))

    def take(self, worker: str) -> tuple[Step, ...]:
        """The steps kept since the last call, in order of time."""
        with self._lock:
            self._seen.pop(worker, None)
            return tuple(sorted(self._kept.pop(worker, ()), key=lambda step: step.at_s))

    def _keep(self, worker: str, step: Step) -> None:
        kept, seen = self._kept.setdefault(worker, []), self._seen.get(worker, 0)
        self._seen[worker] = seen + 1
        if len(kept) < _KEPT:
            kept.append(step)
        elif (place := self._random.randrange(seen + 1)) < _KEPT:  # reservoir sampling
            kept[place] = step


def _sample(step: StepRecord, began_s: float) -> Step:
    return Step(
        at_s=round(step.started_s - began_s, 3),
        tokens=step.tokens,
        sequences=step.sequences,
        prefills=step.prefills,
        prefill_attention=round(step.prefill_attention, 1),
        decode_kv_tokens=step.decode_kv_tokens,
        ms=max(round(1e3 * step.device_s, 3), 0.001),
    )
