"""A request as the scheduler knows it; the engine core and the simulator add what is theirs."""

from __future__ import annotations

import math
from dataclasses import dataclass, field

from nexusengine.types import EngineRequest


@dataclass(slots=True, kw_only=True)
class SchedulerRequest:
    """What planning, placing and preempting a request needs beside its columns.

    Attributes:
        request: as it was submitted.
        max_tokens: output tokens at which it ends.
        block_hashes: hashes of its full KV blocks, in order, as far as they are known; empty without a prefix cache.
        slot: its row in all tables, given by `Scheduler.add`.
        scheduled_s: timestamp at which it was admitted first.
        cached_tokens: prompt tokens that the prefix cache held then.
        expected_tokens: length that its answer was to exceed in one of ten cases, said on its arrival; NaN if unknown.
        preemptions: how often its KV was taken back.
        ever_relegated: a plan relegated it at some time.
    """

    request: EngineRequest
    max_tokens: int
    block_hashes: list[bytes] = field(default_factory=list)
    slot: int = -1
    scheduled_s: float | None = None
    cached_tokens: int = 0
    expected_tokens: float = math.nan
    preemptions: int = 0
    ever_relegated: bool = False

    @property
    def prompt_tokens(self) -> int:
        return len(self.request.prompt_token_ids)
