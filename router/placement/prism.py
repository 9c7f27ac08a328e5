"""PRISM: a request goes where it will meet its SLO at the least harm to others. PURE.

Each worker's own performance model says what the request would cost there: when its first token would come behind the
prompts that are due before it, how long the decode step would be with it, whether its KV fits, and whether it would
make another late. See docs/prism.md.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from nexusengine.arrays import F8, Bools
from nexusengine.errors import ConfigError
from nexusengine.router.placement.candidates import Rotation, why_none
from nexusengine.router.placement.forecast_matrix import Board
from nexusengine.router.placement.policy import Decision, Hold, Place, PlacementRequest, WorkerView

_SOFT_SHARE, _SOFT_S = 0.15, 0.02
_TPOT_FROM, _KV_FROM = 0.9, 0.95
_LEAST_S = 1e-3
_INF = float("inf")


@dataclass(frozen=True, slots=True)
class Costs:
    """What a request costs on each worker `[W]`, in requests that miss their SLO.

    first_token_s: predicted time from now to its first token. late: whether that is too late for it, softly as it comes
    near. decode: how far the decode step, decode_s, exceeds what its TPOT allows. kv: how far the KV cache overflows.
    harm: to others, by making one of them late or their decode step too long. spent: the share of its TTFT that is
    used up; of a request without one, how long it takes in all compared with the quickest.
    """

    first_token_s: F8
    decode_s: F8
    late: F8
    decode: F8
    kv: F8
    harm: F8
    spent: F8


class Prism:
    """delay: weight of the used-up share of the TTFT. tie: costs this close count as equal. roll: how much of the time
    since a report is taken as worked off. hold: how long in seconds a request that nobody can serve in time may stay in
    the router while somebody yet might; 0 sends it on at once."""

    name = "prism"
    uses_prefixes = True

    def __init__(self, delay: float = 0.2, tie: float = 0.002, roll: float = 0.0, hold: float = 0.0) -> None:
        if delay <= 0.0 or tie < 0.0 or not 0.0 <= roll <= 1.0 or hold < 0.0:
            raise ConfigError(
                f"prism: delay must be above 0, tie and hold at least 0, roll in 0..1, got delay={delay}, tie={tie}, "
                f"roll={roll}, hold={hold}",
                param="router",
            )
        self._delay, self._tie, self._roll, self._hold_s = delay, tie, roll, hold
        self._board = Board()
        self._rotation = Rotation()

    def prepare(self, workers: Sequence[WorkerView], now: float) -> None:
        self._board.update(workers, now)

    def place(self, request: PlacementRequest, workers: Sequence[WorkerView], now: float) -> Decision:
        board = self._board
        board.update(workers, now)
        may = board.may(request)
        if may is None:
            return why_none(request, workers)
        costs = assess(board, request, now, self._roll)
        missed = np.minimum(costs.late + costs.decode, 1.0) + costs.kv + costs.harm
        feasible = may & (missed < 1.0)
        if not feasible.any():
            return self._relegate(request, workers, costs, may, now)
        score = np.where(feasible, missed + self._delay * costs.spent, _INF)
        return self._choose(workers, costs, score, self._tie, "in time")

    def _relegate(
        self, request: PlacementRequest, workers: Sequence[WorkerView], costs: Costs, may: Bools, now: float
    ) -> Decision:
        """Nobody can serve it in time without making another late. It goes where it waits least: engines serve what is
        late behind all else."""
        board = self._board
        if self._hold_s and request.slo is not None:
            lone_s = lone_service_s(board, request, board.cached_tokens(request))
            latest_s = request.first_token_due_s - float(lone_s[may].min())
            if now < min(latest_s, request.arrival_s + self._hold_s):
                return Hold(latest_s, "nobody can serve it in time yet", everyone=False)
        able = may & (costs.decode < 1.0)  # elsewhere its TPOT is out of reach, whatever comes
        wait_s = board.rest_s + board.ahead_s[:, -1] + board.late_s
        score = np.where(able if able.any() else may, wait_s, _INF)
        reason = "relegated: nobody can serve it in time" if request.slo else "where it waits least"
        return self._choose(workers, costs, score, 0.0, reason)

    def _choose(self, workers: Sequence[WorkerView], costs: Costs, score: F8, tie: float, reason: str) -> Place:
        """The least score, ties in rotation: the one that has waited longest for its turn."""
        scores = score.tolist()
        limit = min(scores) + tie
        equal = [i for i, s in enumerate(scores) if s <= limit]
        best = equal[0] if len(equal) == 1 else min(equal, key=lambda i: self._rotation.last(workers[i].worker_id))
        self._rotation.took(workers[best].worker_id)
        chosen = scores[best]
        scores[best] = _INF
        second = min(scores)
        return Place(
            workers[best].worker_id,
            reason,
            workers[scores.index(second)].worker_id if second < _INF else None,
            float(costs.first_token_s[best]),
            {
                "score": chosen,
                "late": float(costs.late[best]),
                "decode": float(costs.decode[best]),
                "kv": float(costs.kv[best]),
                "harm": float(costs.harm[best]),
                "decode_s": float(costs.decode_s[best]),
            },
        )


def lone_service_s(board: Board, request: PlacementRequest, cached: F8 | float) -> F8:
    """How long the request's prompt takes on each worker with nothing ahead of it `[W]`."""
    left = request.prompt_tokens - cached
    first_s = board.first_step_s + np.minimum(left, board.chunk_tokens) * board.chunk_token_s
    pairs = left * (cached + 0.5 * left)
    service_s: F8 = np.maximum(left * board.per_token_s, first_s) + board.per_pair_s * pairs
    return service_s


def assess(board: Board, request: PlacementRequest, now: float, roll: float = 0.0) -> Costs:
    """The costs of a request on every worker of the board. roll: see Prism."""
    cached = board.cached_tokens(request)
    left = request.prompt_tokens - cached
    position = board.position(request.first_token_due_s, left)
    wait_s = board.rest_s + board.ahead_s[board.rows, position]
    if roll:
        wait_s = np.maximum(wait_s - roll * (now - board.at_s), board.rest_s)
    first_token_s = wait_s + lone_service_s(board, request, cached)
    decode_s = board.decode_s + board.per_kv_s * request.prompt_tokens
    late = decode = np.zeros(len(board.views))
    if request.slo is not None:
        slack_s = request.first_token_due_s - now - first_token_s
        late = within(1.0 - slack_s / (_SOFT_SHARE * first_token_s + _SOFT_S))
        spent = first_token_s / request.slo.ttft_s
        decode = over(decode_s / request.slo.tpot_s, _TPOT_FROM)
        tightest_s = np.minimum(board.tightest_tpot_s, request.slo.tpot_s)
    else:
        whole_s = first_token_s + board.mean_output * decode_s
        spent = whole_s / max(float(whole_s.min()), _LEAST_S)
        tightest_s = board.tightest_tpot_s
    service_s = left * (board.per_token_s + board.per_pair_s * (cached + 0.5 * left))
    harm = over(decode_s / tightest_s, _TPOT_FROM) - decode  # what it exceeds of the others' bound beyond its own
    harm = np.where(board.slack_s[board.rows, position] < service_s, 1.0, harm)
    kv = over((board.kv_tokens + left + board.mean_output) / board.kv_capacity, _KV_FROM)
    return Costs(first_token_s, decode_s, late, decode, kv, harm, spent)


def within(share: F8) -> F8:
    """Not below 0 and not above 1."""
    inside: F8 = np.minimum(np.maximum(share, 0.0), 1.0)
    return inside


def over(share: F8, begin: float) -> F8:
    """0 up to `begin`, rising to 1 at 1."""
    return within((share - begin) / (1.0 - begin))
