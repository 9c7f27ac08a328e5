"""The prompts that wait in a worker, in the order in which its engine serves them. PURE."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from nexusengine.arrays import F8, I8, Bools
from nexusengine.scheduler.moore_hodgson import defer
from nexusengine.wire import PolicyTraits

_INF = float("inf")


@dataclass(frozen=True, slots=True)
class Queue:
    """Waiting prompts.

    Attributes:
        keys: `[N]`, what they are served by, least first: the timestamp their first token is due (infinite without an
            SLO); minus infinity where they are served as they came; tokens left where the shortest goes first.
        limit_s: `[N]`, timestamp by which each must be done; infinite for those whom nothing can make late, because the
            report only sums them up or because they are late anyway.
        service_s: `[N]`, seconds for which each keeps the worker busy.
    """

    keys: F8
    limit_s: F8
    service_s: F8

    def __len__(self) -> int:
        return len(self.keys)

    def __getitem__(self, chosen: I8 | Bools) -> Queue:
        return Queue(self.keys[chosen], self.limit_s[chosen], self.service_s[chosen])

    def __add__(self, later: Queue) -> Queue:
        """These, then `later`; not sorted."""
        return Queue(
            np.concatenate([self.keys, later.keys]),
            np.concatenate([self.limit_s, later.limit_s]),
            np.concatenate([self.service_s, later.service_s]),
        )

    def done_s(self) -> F8:
        """Seconds of service `[N + 1]` of the first i of them."""
        done_s = np.zeros(len(self) + 1)
        np.cumsum(self.service_s, out=done_s[1:])
        return done_s

    def slack_s(self, done_s: F8, start_s: float) -> F8:
        """Seconds `[N + 1]` by which those from the i-th on can be delayed without any getting late; the last infinite.

        Args:
            done_s: as returned by `done_s`.
            start_s: timestamp at which the first is begun.
        """
        slack_s = np.full(len(self) + 1, _INF)
        if len(self):
            np.minimum.accumulate((self.limit_s - start_s - done_s[1:])[::-1], out=slack_s[-2::-1])
        return slack_s


def sort_keys(traits: PolicyTraits, due_s: F8, left: F8) -> F8:
    """`Queue.keys` of prompts that are due at due_s `[N]` and have `left [N]` tokens to compute."""
    if traits.order == "arrival":
        return np.full(len(due_s), -_INF)
    return due_s if traits.order == "deadline" else left


def in_time(queue: Queue, traits: PolicyTraits, start_s: float) -> I8:
    """Who is served in time, or all if the engine relegates none: indices into the queue, in the order of service.

    Args:
        start_s: timestamp from which on the engine serves them.
    """
    if traits.order == "arrival":
        return np.arange(len(queue))
    order: I8 = np.arange(len(queue))
    if np.count_nonzero(queue.keys[1:] < queue.keys[:-1]):
        order = queue.keys.argsort(kind="stable")
    if not traits.relegates:
        return order
    service_s, allowed_s = queue.service_s[order], queue.limit_s[order] - start_s
    if not np.count_nonzero(np.cumsum(service_s) > allowed_s):
        return order
    late = defer(service_s, allowed_s) if traits.order == "deadline" else _late_in_turn(service_s, allowed_s)
    return order[~late]


def roll_forward(queue: Queue, traits: PolicyTraits, start_s: float) -> tuple[Queue, float]:
    """The queue as the engine serves it from the timestamp start_s on.

    Returns:
        Those that it can serve in time, or all of them if it relegates none; and the seconds of service of those left
        out.
    """
    served = queue[in_time(queue, traits, start_s)]
    if traits.order == "arrival":  # a new request waits for all, and delays none
        return Queue(served.keys, np.full(len(served), _INF), served.service_s), 0.0
    if len(served) < len(queue):
        return served, float(queue.service_s.sum() - served.service_s.sum())
    late = np.cumsum(served.service_s) > served.limit_s - start_s
    if np.count_nonzero(late):
        return Queue(served.keys, np.where(late, _INF, served.limit_s), served.service_s), 0.0
    return served, 0.0


def _late_in_turn(service_s: F8, allowed_s: F8) -> Bools:
    """Who is late and so left out, one after the other."""
    late, done_s = np.zeros(len(service_s), np.bool_), 0.0
    for i, (service, allowed) in enumerate(zip(service_s.tolist(), allowed_s.tolist(), strict=True)):
        late[i] = done_s + service > allowed
        done_s += 0.0 if late[i] else service
    return late
