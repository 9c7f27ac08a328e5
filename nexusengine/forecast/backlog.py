"""The prompts that an engine has, rolled forward at the speed that its performance model predicts. PURE."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol, TypeVar

import numpy as np

from nexusengine.arrays import F8, Bools
from nexusengine.forecast.queue import Queue, in_time, roll_forward, sort_keys
from nexusengine.forecast.speed import Speed
from nexusengine.wire import PolicyTraits

_INF = float("inf")
_ROUNDING = 1e-6  # of a step: sums of service are not exact
Number = TypeVar("Number", float, F8)


class Rates(Protocol[Number]):  # type: ignore[misc]  # read-only members of a tuple or a frozen dataclass
    """How fast prompts are computed: those fields of Speed, of one engine or `[W]` of many."""

    @property
    def per_token_s(self) -> Number: ...
    @property
    def per_pair_s(self) -> Number: ...
    @property
    def chunk_token_s(self) -> Number: ...
    @property
    def chunk_tokens(self) -> Number: ...


@dataclass(frozen=True, slots=True)
class Prompts:
    """Prompts to compute.

    Attributes:
        due_s: `[N]`, timestamp at which the first token is due; infinite without an SLO.
        left: `[N]`, tokens to compute.
        done: `[N]`, tokens before them in the KV cache.
        unlisted_tokens: to compute of prompts of which no more is known; they come after all others.
        relegated_tokens: to compute of those that are relegated; they come last of all.
    """

    due_s: F8
    left: F8
    done: F8
    unlisted_tokens: float = 0.0
    relegated_tokens: float = 0.0


@dataclass(frozen=True, slots=True)
class Backlog:
    """What an engine has to do before it can begin anything new.

    Attributes:
        queue: the waiting prompts that can be in time.
        late_s: service of all others: relegated by the engine, or too late by this forecast.
        rest_s: of the step under way.
        start_s: timestamp at which that step ends.
    """

    queue: Queue
    late_s: float
    rest_s: float
    start_s: float


def backlog(prompts: Prompts, speed: Speed, traits: PolicyTraits, rest_s: float, now: float) -> Backlog:
    """Roll prompts forward.

    Args:
        speed: of the engine beside its present decodes.
        traits: of the engine's policy.
        rest_s: seconds until the step under way ends.
        now: timestamp, seconds.
    """
    keys = sort_keys(traits, prompts.due_s, prompts.left)
    queue = Queue(keys, prompts.due_s, speed.service_s(prompts.left, prompts.done))
    if prompts.unlisted_tokens:
        last = keys.max(initial=-_INF) if len(keys) else _INF
        queue += Queue(np.array([last]), np.array([_INF]), np.array([speed.per_token_s * prompts.unlisted_tokens]))
    start_s = now + rest_s
    queue, late_s = roll_forward(queue, traits, start_s)
    return Backlog(queue, speed.per_token_s * prompts.relegated_tokens + late_s, rest_s, start_s)


def first_tokens_in_s(
    prompts: Prompts, relegated: Bools, speed: Speed, traits: PolicyTraits, rest_s: float, now: float
) -> F8:
    """Seconds until each of the prompts has its first token, if nothing else comes.

    Those that cannot be in time come after the others, in the order given.

    Args:
        prompts: that the engine has, the first to arrive first; what is not listed counts for nothing.
        relegated: `[N]`, who goes after all others in any case.
        speed, traits, rest_s, now: as of `backlog`.

    Returns:
        `[N]`.
    """
    service_s = speed.service_s(prompts.left, prompts.done)
    able = np.flatnonzero(~relegated)
    keys = sort_keys(traits, prompts.due_s, prompts.left)
    queue = Queue(keys[able], prompts.due_s[able], service_s[able])
    served = able[in_time(queue, traits, now + rest_s)]
    is_late = np.ones(len(service_s), np.bool_)
    is_late[served] = False
    order = np.concatenate([served, np.flatnonzero(is_late)])
    left, done, service_s = prompts.left[order], prompts.done[order], service_s[order]
    steps = service_s / speed.step_s if speed.by_time else left / speed.chunk_tokens
    until = np.cumsum(steps)
    in_s = np.empty(len(order))
    in_s[order] = first_token_in_s(
        speed, rest_s, np.cumsum(service_s) - service_s, until - steps, until[-1:] - until, left, done
    )
    return in_s


def first_token_in_s(
    rates: Rates[Number],
    rest_s: Number | float,
    ahead_s: Number,
    ahead: Number,
    behind: Number,
    left: Number | float,
    done: Number | float,
) -> Number:
    """Seconds until a prompt has its first token: the end of the step that computes its last token.

    Steps are full as long as there is anything to compute, also of prompts that are served after this one.

    Args:
        rates: of the engine.
        rest_s: seconds until the step under way ends.
        ahead_s: service of the prompts that are served before this one.
        ahead: the same in full steps; behind: that of those after it.
        left: its tokens to compute.
        done: its tokens in the KV cache.
    """
    steps = ahead + left / rates.chunk_tokens
    whole = np.ceil(steps - _ROUNDING)
    rounded = (whole - steps) * rates.chunk_tokens
    unfilled = np.maximum(rounded - behind * rates.chunk_tokens, 0.0)
    own_s = (left + rounded) * rates.per_token_s - unfilled * rates.chunk_token_s
    in_s: Number = rest_s + ahead_s + own_s + rates.per_pair_s * left * (done + 0.5 * left)
    return in_s
