"""The truth about requests in flight: who asked, who works on it, and whether its client has seen a token."""

from __future__ import annotations

import enum
import heapq
from collections.abc import Iterator
from dataclasses import dataclass

from nexusengine.router.policy import PlacementRequest
from nexusengine.types import EngineRequest

NO_DEADLINE = float("inf")


class Stage(enum.Enum):
    """HELD: at no worker. DISPATCHED: at one, its client has seen nothing. STREAMING: its client has seen tokens."""

    HELD = enum.auto()
    DISPATCHED = enum.auto()
    STREAMING = enum.auto()


@dataclass(slots=True)
class Entry:
    """One request in flight. identity: the worker process it is at; seq: of its dispatch; attempts: dispatches."""

    request: EngineRequest
    placement: PlacementRequest
    client: bytes
    stage: Stage = Stage.HELD
    identity: bytes | None = None
    seq: int = 0
    attempts: int = 0

    @property
    def tokens(self) -> int:
        return self.placement.prompt_tokens + self.placement.max_tokens


class Ledger:
    """Entries by request id, with the held ones in order and counts for each worker process."""

    def __init__(self) -> None:
        self._entries: dict[str, Entry] = {}
        self._held: dict[str, None] = {}
        self._at: dict[bytes, dict[str, None]] = {}
        self._deadlines: list[tuple[float, str]] = []

    def __len__(self) -> int:
        return len(self._entries)

    def __contains__(self, request_id: str) -> bool:
        return request_id in self._entries

    @property
    def held(self) -> int:
        return len(self._held)

    def get(self, request_id: str) -> Entry | None:
        return self._entries.get(request_id)

    def add(self, request: EngineRequest, client: bytes) -> Entry:
        """Enter a request as held. Raises ValueError if its id is in flight."""
        if request.request_id in self._entries:
            raise ValueError(f"request {request.request_id!r} is in flight already")
        deadline_s = NO_DEADLINE if request.deadline_s is None else request.deadline_s
        placement = PlacementRequest(
            request_id=request.request_id,
            prompt_tokens=len(request.prompt_token_ids),
            max_tokens=request.sampling.max_tokens or 0,
            arrival_s=request.arrival_s,
            deadline_s=deadline_s,
            slo=request.slo,
            priority=request.priority,
        )
        entry = Entry(request, placement, client)
        self._entries[request.request_id] = entry
        self._held[request.request_id] = None
        if deadline_s != NO_DEADLINE:
            heapq.heappush(self._deadlines, (deadline_s, request.request_id))
        return entry

    def dispatch(self, entry: Entry, identity: bytes, seq: int) -> None:
        """The entry goes to a worker process."""
        self._leave(entry)
        entry.stage, entry.identity, entry.seq = Stage.DISPATCHED, identity, seq
        entry.attempts += 1
        self._at.setdefault(identity, {})[entry.request.request_id] = None

    def hold(self, entry: Entry) -> None:
        """The entry is at no worker (any more)."""
        self._leave(entry)
        entry.stage, entry.identity = Stage.HELD, None
        self._held[entry.request.request_id] = None

    def remove(self, entry: Entry) -> None:
        self._leave(entry)
        del self._entries[entry.request.request_id]

    def at(self, identity: bytes) -> list[Entry]:
        """Entries at a worker process, in order of dispatch."""
        return [self._entries[i] for i in self._at.get(identity, {})]

    def of_client(self, client: bytes) -> list[Entry]:
        return [e for e in self._entries.values() if e.client == client]

    def held_entries(self) -> Iterator[Entry]:
        """In order of arrival here; the ledger may change while this is consumed."""
        return iter([self._entries[i] for i in self._held])

    def expired(self, now: float) -> list[Entry]:
        """Entries whose deadline is over; each is returned once."""
        found = []
        while self._deadlines and self._deadlines[0][0] <= now:
            deadline_s, request_id = heapq.heappop(self._deadlines)
            entry = self._entries.get(request_id)
            if entry is not None and entry.placement.deadline_s == deadline_s:
                found.append(entry)
        return found

    def _leave(self, entry: Entry) -> None:
        self._held.pop(entry.request.request_id, None)
        if entry.identity is not None:
            here = self._at[entry.identity]
            del here[entry.request.request_id]
            if not here:
                del self._at[entry.identity]
