"""How long a step may take for the sake of requests that are yet to come.

Who arrives while a step computes waits for its end. Shorter steps keep that wait within the slack that such requests
have, and cost throughput, because every step pays its fixed cost anew. Both are weighed with what the traffic and the
performance model say: where nobody with an SLO comes there is no cap at all, and no cap costs more than a tenth of the
throughput.
"""

from __future__ import annotations

import numpy as np

from nexusengine.arrays import F8
from nexusengine.perf.model import Predictor

_INF = float("inf")
_MEMORY = 64  # arrivals with an SLO
_MEMORY_S = 60.0  # after which nobody counts as having come lately
_LEAST_SINCE_S = 10.0  # over which the work that came is spread at least: one request is no traffic
_LEAST_EFFICIENCY = 0.9  # of the largest step's tokens a second
_WAIT_SHARE = 0.5  # of its slack that a request may wait for the step under way; the rest is for those before it
_PROMISE_WEIGHT = 10.0  # times the work of a request that comes too late, in work lost to short steps
_SHARES = 1.5 ** np.arange(-12.0, 0.5)  # of max_batch_tokens, the sizes of steps that are weighed
_ONES, _ZEROS = np.ones(len(_SHARES)), np.zeros(len(_SHARES))


class StepCap:
    """Learns which requests with an SLO arrive: how often, how much work they are, and how much slack they have."""

    def __init__(self) -> None:
        self._at_s = np.full(_MEMORY, -_INF)
        self._slack_s, self._work_s = np.zeros(_MEMORY), np.zeros(_MEMORY)
        self._next = 0

    def arrived(self, now: float, slack_s: F8, work_s: F8) -> None:
        """Requests with an SLO have come.

        Args:
            slack_s: `[N]`, seconds of their TTFT beyond their own work.
            work_s: `[N]`, predicted seconds of it.
        """
        places = (self._next + np.arange(len(slack_s))) % _MEMORY
        self._at_s[places], self._slack_s[places], self._work_s[places] = now, slack_s, work_s
        self._next = (self._next + len(slack_s)) % _MEMORY

    def prompts_s(self, model: Predictor, max_batch_tokens: int, now: float) -> float:
        """The most time for prompts in a step, beside its decodes: seconds; infinite where nobody gains by a cap.

        The step size with the least loss: of throughput, against the largest step, and of work that is done in vain
        because it comes too late. A request that arrives while a step of s seconds computes waits for its end between 0
        and s, each as likely.
        """
        lately = self._at_s > now - _MEMORY_S
        if not np.count_nonzero(lately):
            return _INF
        slack_s = _WAIT_SHARE * self._slack_s[lately]
        since_s = max(now - float(self._at_s[lately].min()), _LEAST_SINCE_S)
        load = min(float(self._work_s[lately].sum()) / since_s, 1.0)
        tokens = _SHARES * max_batch_tokens
        step_s = model.mean_s(tokens, _ONES, _ONES, _ZEROS, _ZEROS)
        efficiency = tokens / step_s
        efficiency /= efficiency.max()
        late = np.maximum(1.0 - slack_s / step_s[:, None], 0.0).mean(axis=1)
        loss = 1.0 - efficiency + _PROMISE_WEIGHT * load * late
        loss[efficiency < _LEAST_EFFICIENCY] = _INF
        return max(float(step_s[loss.argmin()]), float(slack_s.min()))
