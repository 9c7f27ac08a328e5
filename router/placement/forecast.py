"""What a worker will do with what it has: its queue rolled forward at the speed its own performance model predicts.

A `Snapshot` is derived from a report, a `Forecast` from a snapshot and the dispatches the report does not include; so
that a dispatch costs no new predictions. Times are seconds. PURE.
"""

from __future__ import annotations

from dataclasses import dataclass
from itertools import chain
from typing import Generic, NamedTuple, TypeVar

import numpy as np
from msgspec.structs import astuple

from nexusengine.arrays import F8
from nexusengine.forecast.backlog import Prompts, backlog
from nexusengine.forecast.queue import Queue, roll_forward, sort_keys
from nexusengine.forecast.speed import Speed, predict_speed, predictor_of
from nexusengine.router.placement.alike import error_of
from nexusengine.router.placement.policy import WorkerView
from nexusengine.wire import PerfSnapshot, WorkerInfo, WorkerLoad

_INF = float("inf")
_MAX_TPOT_S = 0.1
_BLOCK_TOKENS = 16
_BATCH_TOKENS = 2048

Number = TypeVar("Number", float, F8)


@dataclass(frozen=True, slots=True)
class Snapshot:
    """A report digested.

    Attributes:
        info, load, perf: what it was derived from; no load: an idle worker.
        speed: of the worker beside the decodes of the report.
        queue: the waiting prompts that can be in time.
        late_s: service of all others: relegated by the engine, or too late by this forecast.
        rest_s: of the step under way.
        start_s: timestamp at which that step ends.
        decodes: sequences that decode.
        pending: prompts that will run; pending_kv: KV tokens of them when they are computed; pending_tokens: those yet
            to be computed.
        kv_tokens: KV tokens held; kv_capacity: most that can be, infinite if not known.
        tightest_tpot_s: least TPOT of all that run or will.
        mean_output: tokens of an answer.
        empty_step_s: a decode step less what its sequences add to it.
    """

    info: WorkerInfo
    load: WorkerLoad | None
    perf: PerfSnapshot | None
    speed: Speed
    queue: Queue
    late_s: float
    rest_s: float
    start_s: float
    decodes: int
    pending: int
    pending_kv: float
    pending_tokens: float
    kv_tokens: float
    kv_capacity: float
    tightest_tpot_s: float
    mean_output: float
    empty_step_s: float


class Estimates(NamedTuple, Generic[Number]):
    """The numbers of a forecast: floats of one worker, or arrays `[W]` of all.

    Attributes:
        per_token_s, per_pair_s, first_step_s, chunk_token_s, chunk_tokens: as in Speed.
        rest_s: as in Snapshot.
        late_s: service that comes after all that can be in time.
        decode_s: a decode step of all sequences once their prompts are computed, and one more.
        per_kv_s: what each KV token of that one adds.
        tightest_tpot_s: least TPOT of them all.
        kv_tokens: KV tokens needed for what is dispatched; kv_capacity: what there is.
        mean_output: tokens of an answer.
        empty_step_s: a decode step less what its sequences add to it; per_row_s: what each adds, without its KV.
        max_running: most sequences of a step, infinite if not known.
        error: share by which its predictions may be off.
        outstanding, prompt_tokens: as in WorkerView.
        waiting_s: service of the prompts whose client has seen no token.
    """

    per_token_s: Number
    per_pair_s: Number
    first_step_s: Number
    chunk_token_s: Number
    chunk_tokens: Number
    rest_s: Number
    late_s: Number
    decode_s: Number
    per_kv_s: Number
    tightest_tpot_s: Number
    kv_tokens: Number
    kv_capacity: Number
    mean_output: Number
    empty_step_s: Number
    per_row_s: Number
    max_running: Number
    error: Number
    outstanding: Number
    prompt_tokens: Number
    waiting_s: Number


@dataclass(frozen=True, slots=True)
class Forecast:
    """A worker's future as far as it is decided, seen from its report.

    Attributes:
        queue: the prompts it can serve in time, by their keys, from the timestamp start_s on.
        ahead_s: `[N + 1]`, service of the first i of them.
        slack_s: `[N + 1]`, by how much those from the i-th on can be delayed without any becoming late; infinite at
            the end.
        estimates: its numbers.
    """

    queue: Queue
    start_s: float
    ahead_s: F8
    slack_s: F8
    estimates: Estimates[float]

    @property
    def keys(self) -> F8:
        """`[N]`, of the queue, not falling."""
        return self.queue.keys


def snapshot(view: WorkerView, now: float, perf: PerfSnapshot | None) -> Snapshot:
    """Digest the view's report; an idle worker at `now` where there is none yet.

    Args:
        perf: the performance model to predict its steps with.
    """
    load, info = view.load or WorkerLoad(last_dispatch_seq=0), view.info
    due_s, left, done, tpot_s = _listed(load)
    reported_tpot_s = load.tightest_tpot_s if load.tightest_tpot_s == load.tightest_tpot_s else _INF
    tightest_tpot_s = min(reported_tpot_s, float(np.fmin.reduce(tpot_s, initial=_INF)))
    speed = predict_speed(
        predictor_of(perf),
        perf.quantile if perf else 1.0,
        load.decodes,
        float(load.decode_kv_tokens),
        tightest_tpot_s,
        info.max_batch_tokens or _BATCH_TOKENS,
        info.traits,
    )
    listed_tokens = float(left.sum())
    unlisted = max(load.pending_tokens - load.relegated_tokens - listed_tokens, 0.0)
    prompts = Prompts(due_s, left, done, unlisted, float(load.relegated_tokens))
    rest_s = 0.5 * (speed.step_s if len(left) or unlisted else speed.decode_s if load.decodes else 0.0)
    work = backlog(prompts, speed, info.traits, rest_s, view.reported_s if view.load is not None else now)
    block = info.block_size or _BLOCK_TOKENS
    return Snapshot(
        info=info,
        load=view.load,
        perf=perf,
        speed=speed,
        queue=work.queue,
        late_s=work.late_s,
        rest_s=work.rest_s,
        start_s=work.start_s,
        decodes=load.decodes,
        pending=max(load.running + load.waiting - load.decodes - load.relegated, 0),
        pending_kv=listed_tokens + float(done.sum()) + unlisted,
        pending_tokens=float(load.pending_tokens),
        kv_tokens=float(load.kv_used_blocks * block),
        kv_capacity=float(load.kv_total_blocks * block) or _INF,
        tightest_tpot_s=tightest_tpot_s,
        mean_output=load.mean_output_tokens,
        empty_step_s=max(
            speed.decode_s - speed.per_row_s * max(load.decodes, 1) - speed.per_kv_s * load.decode_kv_tokens, 0.0
        ),
    )


def _listed(load: WorkerLoad) -> tuple[F8, F8, F8, F8]:
    """The prompts that the report lists, but for relegated ones.

    Returns:
        `[N]` each: timestamp at which the first token is due, tokens to compute, tokens computed, TPOT.
    """
    count = len(load.pending)
    rows = np.fromiter(chain.from_iterable(map(astuple, load.pending)), np.float64, 5 * count).reshape(count, 5)
    if load.relegated:
        rows = rows[rows[:, 4] == 0.0]
    due_s, left, done, tpot_s, _ = rows.T
    return due_s, left, done, tpot_s


def forecast(base: Snapshot, view: WorkerView) -> Forecast:
    """The snapshot and what the view says was dispatched since.

    Of the waiting prompts, only so many decode at once as come to their first token while one decodes: of a queue of
    50 s and answers of 15 s, three tenths.
    """
    speed, queue, late_s = base.speed, base.queue, base.late_s
    if view.unreported:
        queue, later_s = roll_forward(queue + _dispatched(base, view), base.info.traits, base.start_s)
        late_s += later_s
    ahead_s = queue.done_s()
    rows, kv, kv_tokens, tightest_tpot_s = _needs(base, view)
    drain_s = base.rest_s + float(ahead_s[-1]) + late_s
    stays_s = base.mean_output * min(tightest_tpot_s, _MAX_TPOT_S)
    at_once = min(stays_s / drain_s, 1.0) if stays_s and drain_s else 1.0
    decodes = base.decodes + at_once * rows
    estimates = Estimates(
        per_token_s=speed.per_token_s,
        per_pair_s=speed.per_pair_s,
        first_step_s=speed.first_step_s,
        chunk_token_s=speed.chunk_token_s,
        chunk_tokens=speed.chunk_tokens,
        rest_s=base.rest_s,
        late_s=late_s,
        decode_s=speed.decode_s
        + speed.per_row_s * (decodes + 1 - max(base.decodes, 1))
        + speed.per_kv_s * (at_once * kv),
        per_kv_s=speed.per_kv_s,
        tightest_tpot_s=tightest_tpot_s,
        kv_tokens=base.kv_tokens + at_once * kv_tokens,
        kv_capacity=base.kv_capacity,
        mean_output=base.mean_output,
        empty_step_s=base.empty_step_s,
        per_row_s=speed.per_row_s,
        max_running=float(base.info.max_running) or _INF,
        error=error_of(base.perf),
        outstanding=float(view.outstanding),
        prompt_tokens=float(view.prompt_tokens),
        waiting_s=view.waiting_tokens * speed.per_token_s + view.waiting_pairs * speed.per_pair_s,
    )
    return Forecast(queue, base.start_s, ahead_s, queue.slack_s(ahead_s, base.start_s), estimates)


def _dispatched(base: Snapshot, view: WorkerView) -> Queue:
    """The prompts that the report does not include and that are yet to be computed."""
    speed, requests = base.speed, view.unreported
    due_s = np.array([r.first_token_due_s for r in requests])
    done = np.array([float(r.cached_tokens.get(view.worker_id, 0)) for r in requests])
    left = np.array([float(r.prompt_tokens) for r in requests]) - done
    return Queue(sort_keys(base.info.traits, due_s, left), due_s, speed.service_s(left, done))


def _needs(base: Snapshot, view: WorkerView) -> tuple[int, float, float, float]:
    """What the requests need that do not decode yet by the report.

    Returns:
        Sequences; their KV tokens when their prompts are computed; KV tokens of these still to be taken; and the least
        TPOT of all requests.
    """
    kv, kv_tokens, tightest_tpot_s = base.pending_kv, base.pending_tokens, base.tightest_tpot_s
    for r in chain(view.started, view.unreported):
        kv, kv_tokens = kv + r.prompt_tokens, kv_tokens + r.prompt_tokens
        tightest_tpot_s = min(tightest_tpot_s, r.slo.tpot_s) if r.slo else tightest_tpot_s
    cached = sum(r.cached_tokens.get(view.worker_id, 0) for r in view.unreported)
    rows = base.pending + len(view.started) + len(view.unreported)
    return rows, kv, kv_tokens - cached, tightest_tpot_s
