"""One run of a load against a server, from prompts to figures, with what the client itself cost."""

from __future__ import annotations

import asyncio
import resource
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from nexusengine.loadgen.client import run_open_loop
from nexusengine.loadgen.http import Target
from nexusengine.loadgen.items import WorkItem
from nexusengine.loadgen.prompts import Prompts, bodies
from nexusengine.loadgen.record import Record
from nexusengine.loadgen.report import summary
from nexusengine.loadgen.server import ServerInfo
from nexusengine.process.event_loop import loop_factory
from nexusengine.sim.report import rounded_numbers

_USUAL_VOCABULARY = 10_000  # of servers that do not say


@dataclass(frozen=True, slots=True)
class Run:
    """What a load test found.

    Attributes:
        figures: see report.summary; took_s, client_cpu_share (of one core) and client_cpu_us_per_event beside them.
        records: in the order of the items.
    """

    figures: dict[str, Any]
    records: list[Record]


def offer(
    target: Target,
    items: Sequence[WorkItem],
    info: ServerInfo,
    *,
    seed: int = 0,
    bounds: bool = False,
    timeout_s: float = 600.0,
    progress: Callable[[Record], None] = lambda record: None,
) -> Run:
    """Send `items` at their times and wait for all answers. bounds: ask for SLOs in numbers, not by class."""
    prompts = Prompts(info.vocab_size or _USUAL_VOCABULARY, seed)
    made = bodies(items, prompts, info.model, seed=seed, bounds=bounds)
    before_s, began_s = _cpu_s(), time.monotonic()
    with asyncio.Runner(loop_factory=loop_factory()) as runner:
        records = runner.run(run_open_loop(target, items, made, timeout_s=timeout_s, progress=progress))
    took_s, cpu_s = time.monotonic() - began_s, _cpu_s() - before_s
    client = {
        "took_s": took_s,
        "client_cpu_share": cpu_s / took_s,
        "client_cpu_us_per_event": 1e6 * cpu_s / max(sum(r.events for r in records), 1),
    }
    return Run({**summary(records), **rounded_numbers(client)}, records)


def _cpu_s() -> float:
    used = resource.getrusage(resource.RUSAGE_SELF)
    return used.ru_utime + used.ru_stime
