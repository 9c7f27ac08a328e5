"""PRISM: a request goes where it will meet its SLO at the least harm to others. PURE.

Each worker's own performance model says what the request would cost there: when its first token would come after the
prompts that are due before it, how long the decode step would be with it, whether its KV fits, and whether it would
make another late. See docs/prism.md.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np

from nexusengine.arrays import F8, Bools
from nexusengine.errors import ConfigError, Overloaded
from nexusengine.forecast.backlog import first_token_in_s
from nexusengine.profiles.prices import usual_costs
from nexusengine.router.placement.admission import Admission, displaces, late_wait_s
from nexusengine.router.placement.candidates import Rotation, why_none
from nexusengine.router.placement.completion import completion_s, expected_output
from nexusengine.router.placement.economy import Economy
from nexusengine.router.placement.forecast_matrix import ForecastMatrix
from nexusengine.router.placement.policy import Decision, Place, PlacementRequest, Refuse, WorkerView

_SOFT_SHARE, _SOFT_S = 0.15, 0.02
_TPOT_FROM, _KV_FROM = 0.9, 0.95
_MIN_S = 1e-3
_SAME, _SAVED, _EARLY = 1.05, 0.01, 0.25
_MIN_RETRY_S, _MAX_RETRY_S = 1.0, 60.0
_OVER_SHARE_SPENT = 0.15
"""Of its TTFT, that a request may wait whose tenant is over its share: the rest of the queue is for the others."""
_LOOKED_AT = 8
"""Workers on whose queue it is tried whether a request can displace a longer one."""
_INF = float("inf")


@dataclass(frozen=True, slots=True)
class PlacementCosts:
    """What a request costs on each worker, `[W]` each; but for times, in requests that miss their SLO.

    Attributes:
        first_token_s: predicted seconds from now to its first token.
        decode_s: predicted seconds of a decode step with it.
        late: 0 to 1 as the first token comes near the timestamp it is due, 1 beyond.
        decode: 0 to 1 as decode_s comes near its TPOT, 1 beyond.
        kv: 0 to 1 as the KV cache becomes full, 1 beyond.
        harm: to others, by making one of them late or their decode step too long.
        service_s: seconds that its prompt keeps the worker busy.
        spent: share of its TTFT that is used up; without an SLO, when the worker is done with all it has and this
            request, compared with the first to be.
        saved: what its cached prefix makes spent less; with an SLO compared with the earliest first token.
    """

    first_token_s: F8
    decode_s: F8
    late: F8
    decode: F8
    kv: F8
    harm: F8
    service_s: F8
    spent: F8
    saved: F8


class Prism:
    """Least cost among the workers that serve the request in time.

    Args:
        delay: weight of the used-up share of the TTFT.
        tie: costs this close count as equal.
        cost, energy: weights of dollars and of joules among workers that meet the SLO with margin, see economy.Economy;
            0: neither is looked at.
    """

    name = "prism"
    uses_prefixes = True

    def __init__(self, delay: float = 0.2, tie: float = 0.002, cost: float = 0.0, energy: float = 0.0) -> None:
        if delay <= 0.0 or tie < 0.0:
            raise ConfigError(
                f"prism: delay must be above 0 and tie at least 0, got delay={delay} and tie={tie}", param="router"
            )
        self._delay, self._tie = delay, tie
        self._economy = Economy(cost, energy, usual_costs()) if cost or energy else None
        self._matrix = ForecastMatrix()
        self._rotation = Rotation()
        self._admission = Admission()

    def prepare(self, workers: Sequence[WorkerView], now: float) -> None:
        """See PlacementPolicy."""
        self._matrix.update(workers, now)

    def place(self, request: PlacementRequest, workers: Sequence[WorkerView], now: float) -> Decision:
        """See PlacementPolicy."""
        self._matrix.update(workers, now)
        eligible = self._matrix.eligible(request)
        if eligible is None:
            return why_none(request, workers)
        costs = assess(self._matrix, request, now)
        missed = np.minimum(costs.late + costs.decode, 1.0) + costs.kv + costs.harm
        feasible = eligible & (missed < 1.0)
        if request.slo is None:
            return self._place_without_slo(request, workers, costs, missed, feasible if feasible.any() else eligible)
        if request.over_share:
            feasible &= costs.spent <= _OVER_SHARE_SPENT
        if not np.count_nonzero(feasible):
            if request.over_share:
                return self._place_over_share(request, workers, costs, eligible)
            return self._place_late(request, workers, costs, eligible, now)
        score = np.where(feasible, missed + self._delay * costs.spent, _INF)
        if self._economy is not None:
            score = score + self._economy.penalty(self._matrix, request, costs, feasible)
        elif np.count_nonzero(early := self._equally_early(costs, missed, score)) > 1:
            outstanding = np.where(early, self._matrix.estimates.outstanding, _INF)
            return self._choose(workers, costs, outstanding, 0.0, "in time")
        return self._choose(workers, costs, score, self._tie, "in time")

    def _equally_early(self, costs: PlacementCosts, missed: F8, score: F8) -> Bools:
        """Devices of a kind on which the first token comes so early that predictions say little about which is best.

        The worker with the fewest requests among them gets the next, so that a burst is spread evenly.
        """
        e, kinds, best = self._matrix.estimates, self._matrix.kinds, int(score.argmin())
        error = (1.0 + e.error) * (1.0 + e.error[best])
        close: Bools = (kinds == kinds[best]) & (score < _INF) & (missed <= missed[best] + self._tie)
        close &= (costs.spent <= _EARLY) & (costs.spent <= error * costs.spent[best])
        close &= costs.saved >= costs.saved[best] - _SAVED
        return close

    def _place_without_slo(
        self,
        request: PlacementRequest,
        workers: Sequence[WorkerView],
        costs: PlacementCosts,
        missed: F8,
        able: Bools,
    ) -> Place:
        """Place a request that is never late: where it is done first, at no harm to those that can be late.

        Predictions that are closer than they err are equal, and the worker with the fewest requests gets it. What a
        cached prefix saves is no error.
        """
        score = np.where(able, missed + self._delay * costs.spent, _INF)
        if self._economy is not None:
            score = score + self._economy.penalty(self._matrix, request, costs, able)
            return self._choose(workers, costs, score, self._tie, "done first")
        e, kinds, best = self._matrix.estimates, self._matrix.kinds, int(score.argmin())
        same = np.where(kinds == kinds[best], (1.0 + e.error) * (1.0 + e.error[best]), _SAME)
        close = (score <= same * score[best]) & (costs.saved >= costs.saved[best] - _SAVED)
        score = np.where(close, e.outstanding, _INF)
        return self._choose(workers, costs, score, 0.0, "done first")

    def observe(self, in_time: bool) -> None:
        """See PlacementPolicy."""
        self._admission.observe(in_time)

    def saturated(self, now: float) -> bool:
        """See PlacementPolicy."""
        return self._admission.saturated(now)

    def _place_late(
        self,
        request: PlacementRequest,
        workers: Sequence[WorkerView],
        costs: PlacementCosts,
        eligible: Bools,
        now: float,
    ) -> Decision:
        """Place a request that nobody can serve in time without making another late; or refuse it, if that helps.

        One that is shorter than another that is made late is always taken in: as many are in time, with less work.
        """
        m, least_s, displacing = self._matrix, _INF, np.zeros(len(workers), np.bool_)
        soonest = np.where(eligible, costs.first_token_s, _INF).argsort(kind="stable")[:_LOOKED_AT]
        for i in soonest[eligible[soonest]].tolist():
            if (row := m.forecasts[i]) is not None:
                displacing[i] = displaces(row, request, float(costs.service_s[i]), now)
                least_s = min(least_s, late_wait_s(row, float(costs.service_s[i])))
        if displacing.any():
            return self._relegate(workers, costs, displacing if self.saturated(now) else eligible)
        if self._admission.refuses(request, least_s, now):
            ttft_s = request.slo.ttft_s if request.slo else 0.0
            return self._refuse(eligible, f"its first token is not to be expected within {ttft_s:.1f} s")
        return replace(self._relegate(workers, costs, eligible), late=True)

    def _place_over_share(
        self, request: PlacementRequest, workers: Sequence[WorkerView], costs: PlacementCosts, eligible: Bools
    ) -> Decision:
        """Refuse what a tenant asks beyond its share of a cluster that is short, unless its class waits for ever."""
        if request.gives_up_s == _INF:
            return self._relegate(workers, costs, eligible)
        return self._refuse(eligible, "its sender has had more than its share while others wait")

    def _refuse(self, eligible: Bools, reason: str) -> Refuse:
        m, e = self._matrix, self._matrix.estimates
        drain_s = float((e.rest_s + m.ahead_s[:, -1] + e.late_s)[eligible].min())
        return Refuse(Overloaded.code, reason, min(max(drain_s, _MIN_RETRY_S), _MAX_RETRY_S))

    def _relegate(self, workers: Sequence[WorkerView], costs: PlacementCosts, eligible: Bools) -> Place:
        """Place a request that nobody can serve in time without making another late.

        It goes where it waits least, as engines serve what is late after all else.
        """
        able = eligible & (costs.decode < 1.0)  # elsewhere its TPOT is out of reach, whatever comes
        e = self._matrix.estimates
        wait_s = e.rest_s + self._matrix.ahead_s[:, -1] + e.late_s
        score = np.where(able if np.count_nonzero(able) else eligible, wait_s, _INF)
        return self._choose(workers, costs, score, 0.0, "relegated: nobody can serve it in time")

    def _choose(
        self, workers: Sequence[WorkerView], costs: PlacementCosts, score: F8, tie: float, reason: str
    ) -> Place:
        """The least score, ties in rotation: the one that has waited longest for its turn."""
        scores = score.tolist()
        limit = min(scores) + tie
        equal = [i for i, s in enumerate(scores) if s <= limit]
        best = equal[0] if len(equal) == 1 else min(equal, key=lambda i: self._rotation.last(workers[i].worker_id))
        self._rotation.took(workers[best].worker_id)
        return Place(workers[best].worker_id, reason, float(costs.first_token_s[best]))


def assess(matrix: ForecastMatrix, request: PlacementRequest, now: float) -> PlacementCosts:
    """The costs of a request on every worker of the matrix."""
    e = matrix.estimates
    cached = matrix.cached_tokens(request)
    left = request.prompt_tokens - cached
    position = matrix.position(request.first_token_due_s, left)
    ahead_s = matrix.ahead_s[matrix.rows, position]
    step_s = e.per_token_s * e.chunk_tokens
    behind = (matrix.ahead_s[:, -1] - ahead_s) / step_s
    first_token_s = first_token_in_s(e, e.rest_s, ahead_s, ahead_s / step_s, behind, left, cached)
    decode_s = e.decode_s + e.per_kv_s * request.prompt_tokens
    service_s = left * (e.per_token_s + e.per_pair_s * (cached + 0.5 * left))
    kv = _ramp((e.kv_tokens + left + e.mean_output) / e.kv_capacity, _KV_FROM)
    late = decode = np.zeros(len(matrix.views))
    if request.slo is not None:
        slack_s = request.first_token_due_s - now - first_token_s
        late = _clip01(1.0 - slack_s / (_SOFT_SHARE * first_token_s + _SOFT_S))
        spent, saved = (
            first_token_s / request.slo.ttft_s,
            cached * e.per_token_s / max(float(first_token_s.min()), _MIN_S),
        )
        decode = _ramp(decode_s / request.slo.tpot_s, _TPOT_FROM)
        tightest_s = np.minimum(e.tightest_tpot_s, request.slo.tpot_s)
    else:
        done_s = completion_s(e, request.prompt_tokens, service_s, expected_output(request, e.mean_output))
        first_s = max(float(done_s.min()), _MIN_S)
        spent, saved = done_s / first_s, cached * e.per_token_s / first_s
        tightest_s = e.tightest_tpot_s
        kv = np.where(np.isfinite(tightest_s), kv, 0.0)  # a full cache makes nobody late where nobody can be
    harm = _ramp(decode_s / tightest_s, _TPOT_FROM) - decode  # what it exceeds of the others' bound beyond its own
    harm = np.where(matrix.slack_s[matrix.rows, position] < service_s, 1.0, harm)
    return PlacementCosts(first_token_s, decode_s, late, decode, kv, harm, service_s, spent, saved)


def _clip01(share: F8) -> F8:
    inside: F8 = np.minimum(np.maximum(share, 0.0), 1.0)
    return inside


def _ramp(share: F8, begin: float) -> F8:
    """0 up to `begin`, rising to 1 at 1, and no further."""
    return _clip01((share - begin) / (1.0 - begin))
