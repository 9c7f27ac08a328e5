"""The vocabulary of requests and results, as values."""

from __future__ import annotations

import math
from dataclasses import dataclass, field, replace
from typing import Any, Literal

import msgspec

from nexusengine.errors import InvalidRequest, NexusError, error_from_code

FinishReason = Literal["stop", "length", "abort", "error"]
Missed = Literal["refused", "failed", "unfinished", "ttft", "tpot", "e2e"]
MAX_SEED = 2**63 - 1
MAX_LOGPROBS = 20
MAX_STOP_STRINGS = 16
MAX_PRIORITY = 100


def _finite(name: str, value: Any, low: float, high: float) -> None:
    if isinstance(value, bool) or not isinstance(value, int | float) or not math.isfinite(value):
        raise InvalidRequest(f"{name} must be a finite number, got {value!r}", param=name)
    if not low <= value <= high:
        raise InvalidRequest(f"{name} must be between {low} and {high}, got {value}", param=name)


def _whole(name: str, value: Any, low: int, high: int) -> None:
    if isinstance(value, bool) or not isinstance(value, int):
        raise InvalidRequest(f"{name} must be a whole number, got {value!r}", param=name)
    if not low <= value <= high:
        raise InvalidRequest(f"{name} must be between {low} and {high}, got {value}", param=name)


def is_unicode(text: str) -> bool:
    """False for a text with lone surrogates, which JSON can write and UTF-8 cannot."""
    try:
        text.encode()
    except UnicodeEncodeError:
        return False
    return True


@dataclass(frozen=True, slots=True)
class SamplingParams:
    """How tokens are chosen and when a request ends.

    temperature: 0 is greedy. top_k: 0 keeps all. top_p, min_p: nucleus and min-p filters, applied in the order
    top_k, top_p, min_p on the temperature-scaled distribution.
    seed: the same seed gives the same text whatever else is in the batch; None draws one per request.
    max_tokens: None means until the context is full.
    stop: strings, found across token boundaries, never part of the returned text.
    stop_token_ids: ids that end the request, never part of the returned text.
    logprobs: None for none, else the number (0 to 20) of most likely alternatives beside each chosen token.
    Raises InvalidRequest naming the field.
    """

    temperature: float = 1.0
    top_k: int = 0
    top_p: float = 1.0
    min_p: float = 0.0
    seed: int | None = None
    max_tokens: int | None = None
    stop: tuple[str, ...] = ()
    stop_token_ids: tuple[int, ...] = ()
    ignore_eos: bool = False
    logprobs: int | None = None

    def __post_init__(self) -> None:
        _finite("temperature", self.temperature, 0.0, 100.0)
        _whole("top_k", self.top_k, 0, 2**31 - 1)
        _finite("top_p", self.top_p, 0.0, 1.0)
        if self.top_p == 0.0:
            raise InvalidRequest("top_p must be above 0; for greedy decoding use temperature=0", param="top_p")
        _finite("min_p", self.min_p, 0.0, 1.0)
        if self.seed is not None:
            _whole("seed", self.seed, -MAX_SEED - 1, MAX_SEED)
        if self.max_tokens is not None:
            _whole("max_tokens", self.max_tokens, 1, 2**31 - 1)
        if self.logprobs is not None:
            _whole("logprobs", self.logprobs, 0, MAX_LOGPROBS)
        if isinstance(self.stop, str):
            object.__setattr__(self, "stop", (self.stop,))
        for name in ("stop", "stop_token_ids"):
            value = getattr(self, name)
            if not isinstance(value, list | tuple):
                raise InvalidRequest(f"{name} must be a list, got {value!r}", param=name)
            object.__setattr__(self, name, tuple(value))
        if len(self.stop) > MAX_STOP_STRINGS:
            raise InvalidRequest(f"at most {MAX_STOP_STRINGS} stop strings, got {len(self.stop)}", param="stop")
        for s in self.stop:
            if not isinstance(s, str) or not s:
                raise InvalidRequest(f"stop must hold non-empty strings, got {s!r}", param="stop")
            if not is_unicode(s):
                raise InvalidRequest(f"stop holds characters that are not valid Unicode: {s!r}", param="stop")
        for i in self.stop_token_ids:
            _whole("stop_token_ids", i, 0, 2**31 - 1)

    @property
    def greedy(self) -> bool:
        return self.temperature == 0.0

    def with_seed(self, seed: int) -> SamplingParams:
        """The same parameters with the seed filled in if there was none."""
        return self if self.seed is not None else replace(self, seed=seed)


@dataclass(frozen=True, slots=True)
class SLO:
    """A latency promise: first token within `ttft_s` of arrival, then `tpot_s` a token on average.

    Attributes:
        patience: in TTFTs; a saturated cluster refuses the request rather than make it wait longer for its first token.
            Infinite: it is served however late.

    Raises InvalidRequest naming the field.
    """

    ttft_s: float
    tpot_s: float
    e2e_s: float | None = None
    patience: float = math.inf

    def __post_init__(self) -> None:
        _finite("slo.ttft_s", self.ttft_s, 0.001, 86_400.0)
        _finite("slo.tpot_s", self.tpot_s, 0.0001, 3_600.0)
        if self.e2e_s is not None:
            _finite("slo.e2e_s", self.e2e_s, 0.001, 86_400.0)
        if self.patience != math.inf:
            _finite("slo.patience", self.patience, 1.0, 1000.0)


@dataclass(frozen=True, slots=True)
class Verdict:
    """Whether an SLO was met, by the mean contract and by the strict one (see slo.due).

    Attributes:
        missed: the first thing that went wrong; None if met.
    """

    met: bool
    strict_met: bool
    missed: Missed | None = None


@dataclass(frozen=True, slots=True)
class EngineRequest:
    """One generation, validated and tokenised: what a scheduler, a router and a worker see of a user's request.

    arrival_s: monotonic timestamp at which the server got it; TTFT counts from here.
    deadline_s: monotonic timestamp after which it is given up with DeadlineExceeded, or None.
    eos_token_ids: ids that end it unless sampling.ignore_eos.
    slo_class: name of the configured class the SLO is of, "custom" where it was given in numbers, None without one.
    priority: -MAX_PRIORITY to MAX_PRIORITY; higher goes first within a class.
    tenant: whose it is, for fairness between them; all without one are one tenant.
    """

    request_id: str
    prompt_token_ids: list[int]
    sampling: SamplingParams
    arrival_s: float
    eos_token_ids: tuple[int, ...] = ()
    slo: SLO | None = None
    slo_class: str | None = None
    priority: int = 0
    deadline_s: float | None = None
    tenant: str | None = None


@dataclass(frozen=True, slots=True)
class TokenLogprob:
    """Log-probability of a chosen token (natural log, before temperature and filters) and of the most likely ones."""

    token_id: int
    logprob: float
    top: tuple[tuple[int, float], ...] = ()


@dataclass(frozen=True, slots=True)
class Timings:
    """Monotonic timestamps in the life of a request; None where it did not get there."""

    arrival_s: float
    scheduled_s: float | None = None
    first_token_s: float | None = None
    finished_s: float | None = None
    output_tokens: int = 0

    @property
    def queue_s(self) -> float | None:
        return None if self.scheduled_s is None else self.scheduled_s - self.arrival_s

    @property
    def ttft_s(self) -> float | None:
        return None if self.first_token_s is None else self.first_token_s - self.arrival_s

    @property
    def tpot_s(self) -> float | None:
        """Mean time per output token after the first; None with fewer than two tokens."""
        if self.first_token_s is None or self.finished_s is None or self.output_tokens < 2:
            return None
        return (self.finished_s - self.first_token_s) / (self.output_tokens - 1)

    @property
    def e2e_s(self) -> float | None:
        return None if self.finished_s is None else self.finished_s - self.arrival_s


@dataclass(frozen=True, slots=True)
class Service:
    """What a worker knows of how it serves a request.

    Attributes:
        predicted_ttft_s: from arrival to the first token, as predicted when the worker took it in; None where nothing
            reliable could be said.
        unattainable: the device surely cannot meet the SLO even when it serves nothing else.
        strict: every token so far came in time by the strict contract.
    """

    worker: str
    predicted_ttft_s: float | None
    unattainable: bool = False
    strict: bool = True


class TokenDelta(msgspec.Struct, frozen=True):
    """New tokens of one request, as they leave the engine core.

    finish_reason is set on the last delta only; `token_ids` then may be empty. A stop or EOS token ends the request
    and is not in `token_ids`, but counts in `timings.output_tokens`. `error_code` and `error_message` come with
    finish_reason "error". `timings`, `service` and `cached_tokens` (prompt tokens served by the prefix cache) come with
    the first token and with the last delta. A struct, as one is made for every token.
    """

    request_id: str
    token_ids: tuple[int, ...] = ()
    logprobs: tuple[TokenLogprob, ...] | None = None
    finish_reason: FinishReason | None = None
    stop_reason: int | str | None = None
    timings: Timings | None = None
    cached_tokens: int = 0
    preemptions: int = 0
    error_code: str | None = None
    error_message: str | None = None
    retry_after_s: float | None = None
    service: Service | None = None

    @classmethod
    def failed(cls, request_id: str, error: NexusError) -> TokenDelta:
        """The last delta of a request that failed, without the timings that only its worker knows."""
        return cls(
            request_id,
            finish_reason="error",
            error_code=error.code,
            error_message=error.message,
            retry_after_s=error.retry_after_s,
        )

    @property
    def error(self) -> NexusError:
        """The error that a delta with finish_reason "error" carries."""
        return error_from_code(
            self.error_code or "", self.error_message or "no reason was given", retry_after_s=self.retry_after_s
        )


@dataclass(slots=True)  # not frozen: one is made for every token, and that would take three times as long
class RequestOutput:
    """What a caller of `Engine.generate` gets: the whole output, or with stream=True what is new since the last one.

    text, token_ids and logprobs are the whole output in a plain call and the news in a stream.
    text_offsets: where in the whole text each token begins, in characters. Tokens of one character share its offset;
    those of a stop string that was cut off have the text's end. In a stream a token's offset comes with the text that
    it begins, so it may come later than its id.
    stop_reason: the stop string or the token id that ended it, if one did.
    timings, preemptions, service and verdict come with the end; verdict is None without an SLO.
    error: why it failed, with finish_reason "error"; text and token_ids are then what there was before.
    """

    request_id: str
    prompt_token_ids: tuple[int, ...]
    text: str
    token_ids: tuple[int, ...]
    finish_reason: FinishReason | None
    stop_reason: int | str | None = None
    logprobs: tuple[TokenLogprob, ...] | None = None
    timings: Timings | None = None
    cached_tokens: int = 0
    prompt: str | None = None
    metadata: dict[str, Any] = field(default_factory=dict)
    slo: SLO | None = None
    slo_class: str | None = None
    preemptions: int = 0
    service: Service | None = None
    verdict: Verdict | None = None
    text_offsets: tuple[int, ...] = ()
    error: NexusError | None = None

    @property
    def finished(self) -> bool:
        return self.finish_reason is not None
