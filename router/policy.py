"""The contract of placement policies (contract 4 of the architecture). PURE: no sockets, no clock, no randomness."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

from nexusengine.types import SLO
from nexusengine.wire import WorkerInfo, WorkerLoad, WorkerState


@dataclass(frozen=True, slots=True)
class PlacementRequest:
    """What a placement needs to know of a request. deadline_s: when it is given up; not its SLO."""

    request_id: str
    prompt_tokens: int
    max_tokens: int
    arrival_s: float
    deadline_s: float
    slo: SLO | None = None
    priority: int = 0
    prefix_hashes: tuple[bytes, ...] = ()


@dataclass(frozen=True, slots=True)
class WorkerView:
    """A worker as placement sees it: its last report, and the router's own dispatches the report does not include.

    outstanding, outstanding_tokens: all requests dispatched and not finished, and their prompt + output tokens; from
    the ledger, which is the truth.
    """

    info: WorkerInfo
    state: WorkerState
    outstanding: int
    outstanding_tokens: int
    load: WorkerLoad | None = None
    unreported: tuple[PlacementRequest, ...] = ()

    @property
    def worker_id(self) -> str:
        return self.info.worker_id


@dataclass(frozen=True, slots=True)
class Place:
    """Send it to this worker. runner_up: the next best, for the decision trace."""

    worker_id: str
    reason: str
    runner_up: str | None = None


@dataclass(frozen=True, slots=True)
class Hold:
    """No worker can take it now; ask again at any change, at the latest at `until_s`."""

    until_s: float
    reason: str


@dataclass(frozen=True, slots=True)
class Refuse:
    """It is answered with the error of this code (see errors.ERROR_TABLE); retry_after_s if trying again can help."""

    code: str
    reason: str
    retry_after_s: float | None = None


Decision = Place | Hold | Refuse


class PlacementPolicy(Protocol):
    """A rule for where a request runs. May keep private state (rotation of ties)."""

    name: str

    def place(self, request: PlacementRequest, workers: Sequence[WorkerView], now: float) -> Decision: ...
