"""What the router counts: requests by their fate, errors of predictions, requests finished in a second. PURE."""

from __future__ import annotations

from dataclasses import asdict, dataclass, field

from nexusengine.router.ledger import Entry
from nexusengine.types import FinishReason

_RATE_PERIOD_S, _RATE_WEIGHT = 1.0, 0.3
_UNKNOWN_DRAIN_S, _MIN_DRAIN_S, _MAX_DRAIN_S = 5.0, 1.0, 60.0


@dataclass(slots=True)
class PredictionErrors:
    """How well first tokens and prefix hits were predicted.

    Attributes:
        first_tokens_predicted: first tokens of which the policy said when they come.
        first_token_s: seconds from dispatch to these, summed.
        first_token_error_s: seconds by which the predictions were off, summed; each counts for no more than the time
            that it was for, so that a single one cannot drown the others.
        first_tokens_off_by_15, first_tokens_off_by_50: how many were off by more than so many percent of that time.
        prefix_prompt_tokens: prompt tokens of requests whose prefix was looked up.
        prefix_predicted_tokens: of those, tokens believed to be cached at the worker.
        prefix_hit_tokens: of those, tokens that were.
        prefix_error_tokens: differences between the two, request by request.
    """

    first_tokens_predicted: int = 0
    first_token_s: float = 0.0
    first_token_error_s: float = 0.0
    first_tokens_off_by_15: int = 0
    first_tokens_off_by_50: int = 0
    prefix_prompt_tokens: int = 0
    prefix_predicted_tokens: int = 0
    prefix_hit_tokens: int = 0
    prefix_error_tokens: int = 0

    def observe_first_token(self, entry: Entry, now: float) -> None:
        """The first token of a request came at the timestamp `now`."""
        if entry.first_token_in_s is None:
            return
        took_s = now - entry.placed_s
        off_s = abs(took_s - entry.first_token_in_s)
        self.first_tokens_predicted += 1
        self.first_token_s += took_s
        self.first_token_error_s += min(off_s, took_s)
        self.first_tokens_off_by_15 += off_s > 0.15 * took_s
        self.first_tokens_off_by_50 += off_s > 0.50 * took_s

    def observe_prefix(self, entry: Entry, worker_id: str, cached_tokens: int) -> None:
        """The worker found so many tokens of a request's prompt in its cache."""
        predicted = entry.placement.cached_tokens.get(worker_id, 0)
        self.prefix_prompt_tokens += entry.placement.prompt_tokens
        self.prefix_predicted_tokens += predicted
        self.prefix_hit_tokens += cached_tokens
        self.prefix_error_tokens += abs(predicted - cached_tokens)


@dataclass(slots=True)
class RouterStats:
    """Counters since the router started; server.metrics has what each means."""

    requests: int = 0
    requests_stop: int = 0
    requests_length: int = 0
    requests_abort: int = 0
    requests_error: int = 0
    requests_abandoned: int = 0
    dispatches: int = 0
    redispatches: int = 0
    backpressure: int = 0
    placed_late: int = 0
    refused_at_once: int = 0
    refused_late: int = 0
    faults: int = 0
    workers_lost: int = 0
    prefix_digests_lost: int = 0
    errors: PredictionErrors = field(default_factory=PredictionErrors)

    def count_end(self, reason: FinishReason) -> None:
        """A request ended."""
        name = f"requests_{reason}"
        setattr(self, name, getattr(self, name) + 1)

    def counters(self) -> dict[str, float]:
        """All of them by name, for Cluster.counters."""
        own = asdict(self)
        return {**own.pop("errors"), **own}


class FinishRate:
    """Requests that are served in a second, as a moving mean."""

    def __init__(self) -> None:
        self._per_s = 0.0
        self._count, self._since_s = 0, 0.0

    def add(self) -> None:
        """A request finished."""
        self._count += 1

    def update(self, now: float) -> None:
        """Renew the mean if its period is over."""
        if now - self._since_s < _RATE_PERIOD_S:
            return
        self._per_s += _RATE_WEIGHT * (self._count / (now - self._since_s) - self._per_s)
        self._count, self._since_s = 0, now

    def drain_s(self, requests: int) -> float:
        """Predicted seconds until so many requests are placed, between 1 and 60."""
        if self._per_s <= 0:
            return _UNKNOWN_DRAIN_S
        return min(max(requests / self._per_s, _MIN_DRAIN_S), _MAX_DRAIN_S)
