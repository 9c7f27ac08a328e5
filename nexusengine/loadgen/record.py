"""What became of one request, as the client saw it."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from nexusengine.loadgen.items import WorkItem


@dataclass(slots=True)
class Record:
    """Instants are of CLOCK_MONOTONIC, NaN where there is none.

    intended_s: when it was to be sent; sent_s: when it was. first_s, last_s: of the first and the last event with
    tokens. ended_s: when its reply was complete, or it failed. events: how many had tokens; one event may have several.
    in_time: no event came after the timestamp at which the strict contract wants a token of that number. output_tokens:
    as the server counts them. error: kind of failure, None if the answer is complete. nexus: the server's own account.
    """

    item: WorkItem
    intended_s: float
    sent_s: float = float("nan")
    first_s: float = float("nan")
    last_s: float = float("nan")
    ended_s: float = float("nan")
    events: int = 0
    in_time: bool = True
    output_tokens: int = 0
    status: int = 0
    error: str | None = None
    nexus: dict[str, Any] | None = None

    @property
    def completed(self) -> bool:
        return self.error is None

    @property
    def late_s(self) -> float:
        """By how much it was sent too late."""
        return self.sent_s - self.intended_s

    @property
    def ttft_s(self) -> float:
        """From when it was to be sent, whenever it was."""
        return self.first_s - self.intended_s

    @property
    def tpot_s(self) -> float:
        """NaN with fewer than two tokens."""
        return (self.last_s - self.first_s) / (self.output_tokens - 1) if self.output_tokens > 1 else float("nan")

    @property
    def e2e_s(self) -> float:
        return self.last_s - self.intended_s
