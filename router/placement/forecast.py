"""What lies ahead of a worker: its queue rolled forward by deadline at the speed its own performance model predicts.

A `Snapshot` is derived from a report, a `Forecast` from a snapshot and the dispatches the report does not include; so
that a dispatch costs no new predictions. Times are seconds; "pairs" are query-key pairs of prefill attention. PURE.
"""

from __future__ import annotations

import bisect
from dataclasses import dataclass
from functools import cache
from itertools import chain

import numpy as np
from msgspec.structs import astuple

from nexusengine.arrays import F8, Bools
from nexusengine.perf.features import StepFeatures
from nexusengine.perf.model import Predictor
from nexusengine.perf.registry import make_model, rebuild
from nexusengine.router.placement.policy import WorkerView
from nexusengine.scheduler.moore_hodgson import defer
from nexusengine.wire import PerfSnapshot, PolicyTraits, WorkerLoad

REFERENCE_STEP = StepFeatures(
    tokens=544, sequences=33, prefills=1, prefill_attention=512 * 256.0, decode_kv_tokens=32_768
)
"""A step all workers can be compared by: a chunk of 512 tokens beside 32 decodes with 1024 tokens of context each."""

_INF = float("inf")
_LOOSEST_TPOT_S = 0.1
_MARGIN_S = 0.0005
_BLOCK_TOKENS = 16
_BATCH_TOKENS = 2048
_SMALLEST_CHUNK = 16.0
_CHUNK_SHARES = (1 / 2048, 1 / 64, 1 / 32, 1 / 16, 1 / 8, 3 / 16, 1 / 4, 3 / 8, 1 / 2, 3 / 4, 1.0)
_PROBE_PAIRS, _PROBE_KV, _PROBE_ROWS = 4e6, 16_384.0, 16.0
_CHUNKS = len(_CHUNK_SHARES)
_SEQUENCES = np.ones(_CHUNKS + 4)
_PREFILLS = np.array([1.0] * (_CHUNKS + 1) + [0.0] * 3)
_PAIRS = np.array([0.0] * _CHUNKS + [_PROBE_PAIRS, 0.0, 0.0, 0.0])
_KV = np.array([0.0] * (_CHUNKS + 3) + [_PROBE_KV])
_EMPTY = np.zeros(0)


@dataclass(frozen=True, slots=True)
class Speed:
    """How fast a worker computes prompts beside its decodes, and how its decode step grows.

    per_token_s, per_pair_s: of a prompt, with the decodes of the same steps included: what those who wait see.
    first_step_s, chunk_token_s, chunk_tokens: a lone chunk of q tokens takes first_step_s + q * chunk_token_s, and
    chunk_tokens of them fit into a step. step_s: a full step.
    decode_s: a decode-only step over the decodes of now; per_row_s, per_kv_s: what another row, and another KV token
    read, add to it.
    """

    per_token_s: float
    per_pair_s: float
    first_step_s: float
    chunk_token_s: float
    chunk_tokens: float
    step_s: float
    decode_s: float
    per_row_s: float
    per_kv_s: float


def speed(
    model: Predictor,
    quantile: float,
    decodes: int,
    kv_tokens: float,
    tightest_tpot_s: float,
    batch_tokens: int,
    traits: PolicyTraits,
) -> Speed:
    """batch_tokens: most that a step of the engine holds. traits: of its policy, which may keep steps shorter."""
    batch_tokens = min(batch_tokens, traits.step_tokens or batch_tokens)
    paced = traits.by_tpot or traits.step_s < _INF
    rows = float(max(decodes, 1))
    chunks = [q * batch_tokens for q in _CHUNK_SHARES]
    probe = 0.25 * batch_tokens
    tokens = np.array([q + decodes for q in chunks] + [probe + decodes, rows, rows + _PROBE_ROWS, rows])
    sequences = _SEQUENCES + decodes
    sequences[_CHUNKS + 1 :] = tokens[_CHUNKS + 1 :]
    took_s = model.mean_s(tokens, sequences, _PREFILLS, _PAIRS, _KV + kv_tokens).tolist()
    steps_s = took_s[:_CHUNKS]
    probed_s, decode_s, more_rows_s, more_kv_s = took_s[_CHUNKS:]
    first_s = steps_s[0]
    pair_s = max(probed_s - _between(probe, chunks, steps_s), 0.0) / _PROBE_PAIRS
    room = float(max(batch_tokens - decodes, 1))
    chunk = room
    if paced:
        limit_s = max(traits.step_s, traits.single_steps * decode_s)
        if traits.by_tpot:
            limit_s = min(limit_s, tightest_tpot_s)
        limit_s = limit_s / quantile - _MARGIN_S
        chunk = min(max(_between(limit_s, steps_s, chunks), _SMALLEST_CHUNK), room)
    step_s = _between(chunk, chunks, steps_s)
    work_s = max(step_s - first_s, 1e-9)
    return Speed(
        per_token_s=step_s / chunk,
        per_pair_s=pair_s * (step_s / work_s if paced else 1.0),
        first_step_s=first_s,
        chunk_token_s=work_s / chunk,
        chunk_tokens=chunk,
        step_s=step_s,
        decode_s=decode_s,
        per_row_s=max(more_rows_s - decode_s, 0.0) / _PROBE_ROWS,
        per_kv_s=max(more_kv_s - decode_s, 0.0) / _PROBE_KV,
    )


def _between(x: float, xs: list[float], ys: list[float]) -> float:
    """Linear interpolation; outside of `xs` the nearest of `ys`. xs must not fall."""
    if x <= xs[0]:
        return ys[0]
    i = bisect.bisect_left(xs, x)
    if i == len(xs):
        return ys[-1]
    return ys[i - 1] + (ys[i] - ys[i - 1]) * (x - xs[i - 1]) / (xs[i] - xs[i - 1])


@dataclass(frozen=True, slots=True)
class Snapshot:
    """A report digested, at the instant at_s when it came.

    due_s, service_s `[n]`: the pending prompts that can be in time, in the order they are served, and how long each
    keeps the worker busy; due_s is what they are served by: the deadline (infinite without one), minus infinity where
    they are served as they came, or the tokens left where the shortest goes first. limit_s `[n]`: the deadline, but
    infinite for those whom nothing can make late: that the report only sums up, or that are late anyway. late_s: work
    of all others: relegated by the engine, or too late by this forecast.
    decodes, decode_kv, tightest_tpot_s: those running. pending, pending_kv, pending_tpot_s: the prompts that will run,
    when they are computed. kv_tokens: what is held; pending_need: what pending prompts still need. rest_s: of the step
    under way.
    traits: of the engine's policy.
    """

    at_s: float
    speed: Speed
    due_s: F8
    limit_s: F8
    service_s: F8
    late_s: float
    decodes: int
    decode_kv: float
    tightest_tpot_s: float
    pending: int
    pending_kv: float
    pending_tpot_s: float
    kv_tokens: float
    pending_need: float
    kv_capacity: float
    rest_s: float
    mean_output: float
    traits: PolicyTraits


def snapshot(view: WorkerView, now: float) -> Snapshot:
    """Of the view's report; of an idle worker at `now` where there is none yet."""
    load = view.load or WorkerLoad(last_dispatch_seq=0)
    info = view.info
    traits = info.traits
    count = len(load.pending)
    rows = np.fromiter(chain.from_iterable(map(astuple, load.pending)), np.float64, 5 * count).reshape(count, 5)
    if load.relegated:
        rows = rows[rows[:, 4] == 0.0]
    due, left, done, tpot, _ = rows.T
    tightest = load.tightest_tpot_s if load.tightest_tpot_s == load.tightest_tpot_s else _INF
    pending_tpot = float(np.fmin.reduce(tpot, initial=_INF))
    rate = speed(
        predictor_of(load.perf),
        load.perf.quantile if load.perf else 1.0,
        load.decodes,
        float(load.decode_kv_tokens),
        min(tightest, pending_tpot),
        info.max_batch_tokens or _BATCH_TOKENS,
        traits,
    )
    service, limit = left * (rate.per_token_s + rate.per_pair_s * (done + 0.5 * left)), due
    pending_left = float(left.sum())
    unlisted = max(load.pending_tokens - load.relegated_tokens - pending_left, 0.0)
    order = _sort_keys(traits, due, left)
    if unlisted:  # due after all that are listed
        order, limit = np.append(order, order.max(initial=-_INF) if len(due) else _INF), np.append(due, _INF)
        service = np.append(service, rate.per_token_s * unlisted)
    rest_s = 0.5 * (rate.step_s if len(service) else rate.decode_s if load.decodes else 0.0)
    late_s = rate.per_token_s * load.relegated_tokens
    at_s = view.reported_s if view.load is not None else now
    order, limit, service, later_s = _decided(traits, order, limit, service, at_s + rest_s)
    late_s += later_s
    block = info.block_size or _BLOCK_TOKENS
    return Snapshot(
        at_s=at_s,
        speed=rate,
        due_s=order,
        limit_s=limit,
        service_s=service,
        late_s=late_s,
        decodes=load.decodes,
        decode_kv=float(load.decode_kv_tokens),
        tightest_tpot_s=tightest,
        pending=max(load.running + load.waiting - load.decodes - load.relegated, 0),
        pending_kv=pending_left + float(done.sum()) + unlisted,
        pending_tpot_s=pending_tpot,
        kv_tokens=float(load.kv_used_blocks * block),
        pending_need=float(load.pending_tokens),
        kv_capacity=float(load.kv_total_blocks * block) or _INF,
        rest_s=rest_s,
        mean_output=load.mean_output_tokens,
        traits=traits,
    )


def _sort_keys(traits: PolicyTraits, due_s: F8, left: F8) -> F8:
    """What prompts are served by, least first: see Snapshot.due_s."""
    if traits.order == "arrival":
        return np.full(len(due_s), -_INF)
    return due_s if traits.order == "deadline" else left.astype(np.float64)


def _decided(traits: PolicyTraits, order: F8, limit_s: F8, service_s: F8, from_s: float) -> tuple[F8, F8, F8, float]:
    """The prompts as the engine serves them from the instant from_s on: those that it can serve in time, or all if it
    relegates nobody, and the work of those left out. order: their keys."""
    if traits.order == "arrival":  # whoever comes waits for all, and delays nobody
        return order, np.full(len(order), _INF), service_s, 0.0
    if (order[1:] < order[:-1]).any():
        by = order.argsort(kind="stable")
        order, limit_s, service_s = order[by], limit_s[by], service_s[by]
    late = np.cumsum(service_s) > limit_s - from_s
    if not late.any():
        return order, limit_s, service_s, 0.0
    if not traits.relegates:
        return order, np.where(late, _INF, limit_s), service_s, 0.0
    if traits.order == "deadline":
        late = defer(service_s, limit_s - from_s)
    else:
        late = _late_in_turn(service_s, limit_s - from_s)
    return order[~late], limit_s[~late], service_s[~late], float(service_s[late].sum())


def _late_in_turn(service_s: F8, room_s: F8) -> Bools:
    """Who is late and so left out, one after the other."""
    late, done_s = np.zeros(len(service_s), np.bool_), 0.0
    for i, (service, room) in enumerate(zip(service_s.tolist(), room_s.tolist(), strict=True)):
        late[i] = done_s + service > room
        done_s += 0.0 if late[i] else service
    return late


@dataclass(frozen=True, slots=True)
class Forecast:
    """A worker's future as far as it is decided, seen from the instant of its report.

    due_s `[n]`: of the prompts it can serve in time, as in Snapshot, rising. ahead_s `[n + 1]`: work of the first i of
    them.
    slack_s `[n + 1]`: by how much those from the i-th on can be put off without any becoming late; infinite at the end.
    numbers: in the order of FIELDS.
    """

    due_s: F8
    ahead_s: F8
    slack_s: F8
    numbers: tuple[float, ...]


FIELDS = (
    "at_s",
    "per_token_s",
    "per_pair_s",
    "first_step_s",
    "chunk_token_s",
    "chunk_tokens",
    "rest_s",
    "late_s",
    "decode_s",
    "per_kv_s",
    "tightest_tpot_s",
    "kv_tokens",
    "kv_capacity",
    "mean_output",
)
"""Numbers of a forecast. at_s, rest_s: as in Snapshot. late_s: work behind all that can be in time. decode_s: a decode
step of all sequences once their prompts are computed, and one more; per_kv_s: what each KV token of that one adds.
tightest_tpot_s: of them all. kv_tokens: KV needed for what is decided; kv_capacity: what there is."""


def forecast(base: Snapshot, view: WorkerView) -> Forecast:
    """The snapshot and what the view says was dispatched since.

    Of the prompts that wait, only so many decode at once as come to their first token while one decodes: of a queue of
    50 s and answers of 15 s, three tenths.
    """
    v = base.speed
    rows: float
    rows, kv, kv_tokens = base.pending, base.pending_kv, base.pending_need
    tightest = min(base.tightest_tpot_s, base.pending_tpot_s)
    for r in view.started:
        rows, kv, kv_tokens = rows + 1, kv + r.prompt_tokens, kv_tokens + r.prompt_tokens
        tightest = min(tightest, r.slo.tpot_s) if r.slo else tightest
    due, limit, service, late_s = base.due_s, base.limit_s, base.service_s, base.late_s
    if view.unreported:
        new_due, new_left, new_service = [], [], []
        for r in view.unreported:
            done = r.cached_tokens.get(view.worker_id, 0)
            left = r.prompt_tokens - done
            new_due.append(r.first_token_due_s)
            new_left.append(left)
            new_service.append(left * (v.per_token_s + v.per_pair_s * (done + 0.5 * left)))
            rows, kv, kv_tokens = rows + 1, kv + r.prompt_tokens, kv_tokens + left
            tightest = min(tightest, r.slo.tpot_s) if r.slo else tightest
        keys = _sort_keys(base.traits, np.array(new_due), np.array(new_left))
        due, limit, service, later_s = _decided(
            base.traits,
            np.append(due, keys),
            np.append(limit, new_due),
            np.append(service, new_service),
            base.at_s + base.rest_s,
        )
        late_s += later_s
    ahead = np.zeros(len(due) + 1)
    np.cumsum(service, out=ahead[1:])
    slack = np.full(len(due) + 1, _INF)
    if len(due):
        np.minimum.accumulate((limit - (base.at_s + base.rest_s) - ahead[1:])[::-1], out=slack[-2::-1])
    drain_s = base.rest_s + float(ahead[-1]) + late_s
    stays_s = base.mean_output * min(tightest, _LOOSEST_TPOT_S)
    at_once = min(stays_s / drain_s, 1.0) if stays_s and drain_s else 1.0
    rows, kv, kv_tokens = base.decodes + at_once * rows, at_once * kv, base.kv_tokens + at_once * kv_tokens
    numbers = (
        base.at_s,
        v.per_token_s,
        v.per_pair_s,
        v.first_step_s,
        v.chunk_token_s,
        v.chunk_tokens,
        base.rest_s,
        late_s,
        v.decode_s + v.per_row_s * (rows + 1 - max(base.decodes, 1)) + v.per_kv_s * kv,
        v.per_kv_s,
        tightest,
        kv_tokens,
        base.kv_capacity,
        base.mean_output,
    )
    return Forecast(due, ahead, slack, numbers)


def predictor_of(perf: PerfSnapshot | None) -> Predictor:
    """The model a worker reported; an untaught one where it has reported none. Raises ValueError for one it should not
    have sent."""
    if perf is None:
        return _untaught()
    return rebuild(perf)


@cache
def _untaught() -> Predictor:
    return make_model()
