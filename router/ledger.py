"""The truth about requests in flight: who asked, who works on it, and whether its client has seen a token. PURE."""

from __future__ import annotations

import enum
import heapq
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field

from nexusengine.router.placement.policy import PlacementRequest
from nexusengine.types import EngineRequest

NO_DEADLINE = float("inf")


class Stage(enum.Enum):
    """Where a request is.

    Attributes:
        HELD: at no worker.
        DISPATCHED: at one; its client has seen nothing.
        STREAMING: its client has seen tokens.
    """

    HELD = enum.auto()
    DISPATCHED = enum.auto()
    STREAMING = enum.auto()


@dataclass(slots=True)
class Entry:
    """One request in flight.

    Attributes:
        client: identity of who asked.
        identity: the worker process it is at.
        seq: number of its dispatch there.
        attempts: how often it was dispatched.
        placed_s: timestamp of its last dispatch.
        first_token_in_s: seconds to its first token, predicted then.
        late: it was placed although it was predicted to miss its SLO, and nothing has shown yet whether it does.
        left_tokens: of its prompt, those that the worker's prefix cache was not believed to hold then.
        prefix: short hashes of its prompt's blocks (see kv.digest) by block size, as far as they were needed.
        probe: it tests whether a worker's breaker may close.
    """

    request: EngineRequest
    placement: PlacementRequest
    client: bytes
    stage: Stage = Stage.HELD
    identity: bytes | None = None
    seq: int = 0
    attempts: int = 0
    placed_s: float = 0.0
    first_token_in_s: float | None = None
    late: bool = False
    left_tokens: int = 0
    prefix: dict[int, tuple[int, ...]] = field(default_factory=dict)
    probe: bool = False

    @property
    def tokens(self) -> int:
        """Prompt and output tokens at most."""
        return self.placement.prompt_tokens + self.placement.max_tokens

    @property
    def left_pairs(self) -> float:
        """Query-key pairs of prefill attention of the tokens left."""
        return self.left_tokens * (self.placement.prompt_tokens - 0.5 * self.left_tokens)


@dataclass(slots=True)
class Share:
    """What of the ledger is at one worker process, in order of dispatch.

    Attributes:
        unreported: entries that the worker's last report does not include yet.
        tokens: prompt and output tokens of all entries.
        prompt_tokens: prompt tokens of all entries.
        waiting_tokens, waiting_pairs: prompt tokens to compute, and pairs, of entries whose client has seen no token.
        version: rises with every change.
    """

    entries: dict[str, Entry] = field(default_factory=dict)
    unreported: dict[str, Entry] = field(default_factory=dict)
    tokens: int = 0
    prompt_tokens: int = 0
    waiting_tokens: int = 0
    waiting_pairs: float = 0.0
    version: int = 0

    def count(self, entry: Entry, sign: int) -> None:
        """Add an entry's tokens to the sums (sign 1), or take them off (-1)."""
        self.tokens += sign * entry.tokens
        self.prompt_tokens += sign * entry.placement.prompt_tokens
        self.count_waiting(entry, sign)

    def count_waiting(self, entry: Entry, sign: int) -> None:
        """As `count`, what waits for its first token alone."""
        if entry.stage is Stage.DISPATCHED:
            self.waiting_tokens += sign * entry.left_tokens
            self.waiting_pairs += sign * entry.left_pairs


NOTHING = Share()


class Ledger:
    """Entries by request id, with the held ones in order and a share for each worker process."""

    def __init__(self) -> None:
        self._entries: dict[str, Entry] = {}
        self._held: dict[str, Entry] = {}
        self._shares: dict[bytes, Share] = {}
        self._deadlines: list[tuple[float, str]] = []
        self._due: list[tuple[float, str]] = []
        self._patience: list[tuple[float, str]] = []

    def __len__(self) -> int:
        return len(self._entries)

    def __contains__(self, request_id: str) -> bool:
        return request_id in self._entries

    @property
    def held(self) -> int:
        """How many entries are at no worker."""
        return len(self._held)

    def get(self, request_id: str) -> Entry | None:
        """The entry of a request, None if it is not in flight."""
        return self._entries.get(request_id)

    def add(self, request: EngineRequest, client: bytes) -> Entry:
        """Enter a request as held.

        Raises:
            ValueError: its id is in flight.
        """
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
        )
        entry = Entry(request, placement, client)
        self._entries[request.request_id] = self._held[request.request_id] = entry
        for heap, at_s in (
            (self._deadlines, deadline_s),
            (self._due, placement.first_token_due_s),
            (self._patience, placement.gives_up_s),
        ):
            if at_s != NO_DEADLINE:
                heapq.heappush(heap, (at_s, request.request_id))
                if len(heap) > 2 * len(self._entries) + 1000:  # most are of requests that have ended
                    heap[:] = [d for d in heap if d[1] in self._entries]
                    heapq.heapify(heap)
        return entry

    def dispatch(self, entry: Entry, identity: bytes, seq: int, cached_tokens: int = 0) -> None:
        """Move the entry to a worker process.

        Args:
            seq: must be above that of every dispatch to it before.
            cached_tokens: of its prompt, believed to be in the worker's prefix cache.
        """
        self._leave(entry)
        entry.stage, entry.identity, entry.seq = Stage.DISPATCHED, identity, seq
        entry.left_tokens = max(entry.placement.prompt_tokens - cached_tokens, 1)
        entry.attempts += 1
        share = self._shares.setdefault(identity, Share())
        share.entries[entry.request.request_id] = share.unreported[entry.request.request_id] = entry
        share.count(entry, 1)
        share.version += 1

    def streams(self, entry: Entry) -> None:
        """Note that the entry's client sees a token."""
        if entry.stage is Stage.STREAMING or entry.identity is None:
            return
        share = self._shares[entry.identity]
        share.count_waiting(entry, -1)
        entry.stage = Stage.STREAMING
        share.version += 1

    def reported(self, identity: bytes, last_dispatch_seq: int) -> None:
        """Note that a worker process has reported a load that includes its dispatches up to last_dispatch_seq."""
        share = self._shares.get(identity)
        if share is None:
            return
        unreported = share.unreported
        while unreported and (entry := next(iter(unreported.values()))).seq <= last_dispatch_seq:
            del unreported[entry.request.request_id]
            share.version += 1

    def hold(self, entry: Entry) -> None:
        """Take the entry back from its worker."""
        self._leave(entry)
        entry.stage, entry.identity = Stage.HELD, None
        self._held[entry.request.request_id] = entry

    def remove(self, entry: Entry) -> None:
        """End the entry."""
        self._leave(entry)
        entry.identity = None
        del self._entries[entry.request.request_id]

    def share(self, identity: bytes | None) -> Share:
        """What is at a worker process; not to be changed by the caller."""
        return NOTHING if identity is None else self._shares.get(identity, NOTHING)

    def at(self, identity: bytes) -> list[Entry]:
        """Entries at a worker process, in order of dispatch."""
        return list(self.share(identity).entries.values())

    def entries(self) -> Iterable[Entry]:
        """All entries; the ledger is not to be changed meanwhile."""
        return self._entries.values()

    def of_client(self, client: bytes) -> list[Entry]:
        """Entries of a client."""
        return [e for e in self._entries.values() if e.client == client]

    def held_entries(self) -> Iterator[Entry]:
        """Held entries by the timestamp their first token is due, those without an SLO last, as they came.

        The ledger may change while this is consumed.
        """
        return iter(sorted(self._held.values(), key=lambda e: e.placement.first_token_due_s))

    def expired(self, now: float) -> list[Entry]:
        """Entries whose deadline is over; each is returned once."""
        found = []
        while self._deadlines and self._deadlines[0][0] <= now:
            deadline_s, request_id = heapq.heappop(self._deadlines)
            entry = self._entries.get(request_id)
            if entry is not None and entry.placement.deadline_s == deadline_s:
                found.append(entry)
        return found

    def overdue(self, now: float) -> tuple[list[Entry], list[Entry]]:
        """Entries whose client has seen no token.

        Returns:
            Those whose first token was due, and those that waited for it as long as their class allows; each is
            returned once.
        """
        return self._waiting(self._due, now), self._waiting(self._patience, now)

    def _waiting(self, heap: list[tuple[float, str]], now: float) -> list[Entry]:
        found = []
        while heap and heap[0][0] <= now:
            entry = self._entries.get(heapq.heappop(heap)[1])
            if entry is not None and entry.stage is not Stage.STREAMING:
                found.append(entry)
        return found

    def _leave(self, entry: Entry) -> None:
        request_id = entry.request.request_id
        self._held.pop(request_id, None)
        if entry.identity is None:
            return
        share = self._shares[entry.identity]
        del share.entries[request_id]
        share.unreported.pop(request_id, None)
        share.count(entry, -1)
        share.version += 1
        if not share.entries:
            del self._shares[entry.identity]
