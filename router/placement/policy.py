"""The contract of placement policies (contract 4 of the architecture). PURE: no sockets, no clock, no randomness."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Protocol

from nexusengine.slo.due import first_token_due_s
from nexusengine.types import SLO
from nexusengine.wire import WorkerInfo, WorkerLoad, WorkerState


@dataclass(frozen=True, slots=True)
class PlacementRequest:
    """What a placement needs to know of a request.

    Attributes:
        max_tokens: most output tokens, 0 if no limit was given.
        deadline_s: timestamp at which it is timed out; not its SLO.
        cached_tokens: by worker id, tokens of its prompt that the worker's prefix cache is believed to hold; workers
            with none are left out.
        over_share: its tenant has had more than its share of the workers while others wait.
    """

    request_id: str
    prompt_tokens: int
    max_tokens: int
    arrival_s: float
    deadline_s: float
    slo: SLO | None = None
    cached_tokens: Mapping[str, int] = field(default_factory=dict)
    over_share: bool = False

    @property
    def first_token_due_s(self) -> float:
        """When its first token is due; infinite without an SLO."""
        return first_token_due_s(self.arrival_s, self.slo)

    @property
    def gives_up_s(self) -> float:
        """Until when it may wait for its first token on a saturated cluster; infinite without an SLO."""
        return math.inf if self.slo is None else self.arrival_s + self.slo.patience * self.slo.ttft_s


@dataclass(frozen=True, slots=True)
class WorkerView:
    """A worker as placement sees it: its last report, and the router's own dispatches the report does not include.

    A view is replaced when anything in it changes and is the same object while nothing does, so that a policy may keep
    what it derived from one.

    Attributes:
        outstanding: requests dispatched and not finished, from the router's ledger.
        outstanding_tokens: prompt and output tokens of these.
        prompt_tokens: prompt tokens of these.
        waiting_tokens, waiting_pairs: prompt tokens to compute, and query-key pairs of their attention, of those whose
            client has seen no token.
        unreported: dispatches that `load` does not include and whose client has seen no token, in order of dispatch.
        started: those it does not include and that stream already.
        reported_s: timestamp at which `load` came.
        ejected: why it gets no request although it is ready; None if it does.
        slow_start: it joined lately and has as many requests as it should; used only if there is no other.
    """

    info: WorkerInfo
    state: WorkerState
    outstanding: int
    outstanding_tokens: int
    prompt_tokens: int = 0
    waiting_tokens: int = 0
    waiting_pairs: float = 0.0
    load: WorkerLoad | None = None
    unreported: tuple[PlacementRequest, ...] = ()
    started: tuple[PlacementRequest, ...] = ()
    reported_s: float = float("-inf")
    ejected: str | None = None
    slow_start: bool = False

    @property
    def worker_id(self) -> str:
        """Stable over restarts of the worker."""
        return self.info.worker_id

    @property
    def accepts(self) -> bool:
        """Whether requests may be placed on it now."""
        return self.state is WorkerState.READY and self.ejected is None

    def fits(self, request: PlacementRequest) -> bool:
        """Whether the worker can ever hold the request; one that has not said how much it holds may."""
        longest = self.info.max_model_len
        return not longest or request.prompt_tokens + max(request.max_tokens, 1) <= longest


@dataclass(frozen=True, slots=True)
class Place:
    """Send it to this worker.

    Attributes:
        first_token_in_s: predicted seconds until its first token; None from a policy that predicts nothing.
        late: it is predicted to miss its SLO; the policy is told whether its first token came in time.
    """

    worker_id: str
    reason: str
    first_token_in_s: float | None = None
    late: bool = False


@dataclass(frozen=True, slots=True)
class Hold:
    """No worker can take it now; ask again later.

    Attributes:
        everyone: any other request would be held for the same reason, so that there is no use in asking for them.
    """

    reason: str
    everyone: bool = True


@dataclass(frozen=True, slots=True)
class Refuse:
    """It is answered with an error.

    Attributes:
        code: see errors.ERROR_TABLE.
        reason: the error's message.
        retry_after_s: if trying again can help.
    """

    code: str
    reason: str
    retry_after_s: float | None = None


Decision = Place | Hold | Refuse


class PlacementPolicy(Protocol):
    """A rule for where a request runs. May keep private state (rotation of ties, what it derived from views).

    Attributes:
        uses_prefixes: whether it reads `PlacementRequest.cached_tokens`; otherwise they are not looked up.
    """

    name: str
    uses_prefixes: bool

    def place(self, request: PlacementRequest, workers: Sequence[WorkerView], now: float) -> Decision:
        """Decide where the request goes, at the timestamp `now`."""
        ...

    def observe(self, in_time: bool) -> None:
        """A request that was placed as late has got its first token in time, or has not."""
        ...

    def saturated(self, now: float) -> bool:
        """Whether what is late is not worth waiting for: requests are refused at their `gives_up_s`."""
        ...

    def prepare(self, workers: Sequence[WorkerView], now: float) -> None:
        """Digest what is new in the views, so that the next placement finds it done.

        Called between requests; never needed for the result.
        """
        ...
