"""What lies ahead of a worker: its queue rolled forward by deadline at the speed its own performance model predicts.

A `Snapshot` is derived from a report, a `Forecast` from a snapshot and the dispatches the report does not include; so
that a dispatch costs no new predictions. Times are seconds; "pairs" are query-key pairs of prefill attention. PURE.
"""

from __future__ import annotations

import heapq
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from nexusengine.perf.features import StepFeatures
from nexusengine.perf.linear import KIND, LinearModel
from nexusengine.perf.model import F8, Predictor
from nexusengine.router.policy import PlacementRequest, WorkerView
from nexusengine.wire import PerfWeights, WorkerLoad

REFERENCE_STEP = StepFeatures(
    tokens=544, sequences=33, prefills=1, prefill_attention=512 * 256.0, decode_kv_tokens=32_768
)
"""A step all workers can be compared by: a chunk of 512 tokens beside 32 decodes with 1024 tokens of context each."""

IN_ORDER_OF_ARRIVAL = frozenset({"fcfs", "sarathi", "prefill-first"})
"""Engine policies that serve prompts as they came and do not shorten steps for anybody's TPOT."""

_INF = float("inf")
_LONGEST_STEP_S = 0.12
_SINGLE_STEPS = 2.5
_MARGIN_S = 0.0005
_BLOCK_TOKENS = 16
_BATCH_TOKENS = 2048
_CHUNKS = np.array([1.0, 16, 32, 64, 128, 256, 384, 512, 768, 1024, 1536, 2048])
_PROBE_TOKENS, _PROBE_PAIRS, _PROBE_KV, _PROBE_ROWS = 512.0, 4e6, 16_384.0, 16.0
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
    paced: bool,
) -> Speed:
    """paced: the engine keeps its steps within the tightest TPOT of its decodes, as LENS does (LENS.md, 3.3);
    otherwise it fills each step to `batch_tokens`."""
    chunks = (
        _CHUNKS
        if batch_tokens == _BATCH_TOKENS
        else np.unique(np.minimum(_CHUNKS * (batch_tokens / 2048), batch_tokens))
    )
    count, rows = len(chunks), float(max(decodes, 1))
    tokens, sequences, prefills = np.empty(count + 4), np.empty(count + 4), np.ones(count + 4)
    pairs, kv = np.zeros(count + 4), np.full(count + 4, kv_tokens)
    tokens[:count] = chunks + decodes
    sequences[:count] = decodes + 1
    tokens[count:] = (_PROBE_TOKENS + decodes, rows, rows + _PROBE_ROWS, rows)
    sequences[count:] = (decodes + 1, rows, rows + _PROBE_ROWS, rows)
    prefills[count + 1 :] = 0.0
    pairs[count] = _PROBE_PAIRS
    kv[count + 3] += _PROBE_KV
    took_s = model.mean_s(tokens, sequences, prefills, pairs, kv)
    steps_s = took_s[:count]
    probed_s, decode_s, more_rows_s, more_kv_s = took_s[count:].tolist()
    first_s = float(steps_s[0])
    pair_s = max(probed_s - float(np.interp(_PROBE_TOKENS, chunks, steps_s)), 0.0) / _PROBE_PAIRS
    room = max(batch_tokens - decodes, 1)
    if paced:
        limit_s = min(max(_LONGEST_STEP_S, _SINGLE_STEPS * decode_s), tightest_tpot_s) / quantile - _MARGIN_S
        chunk = min(float(np.interp(limit_s, steps_s, chunks)), room)
        chunk = max(chunk, min(16.0, room))
    else:
        chunk = float(room)
    step_s = float(np.interp(chunk, chunks, steps_s))
    work_s = max(step_s - first_s, 1e-9)
    return Speed(
        per_token_s=step_s / chunk,
        per_pair_s=pair_s * (step_s / work_s if paced else 1.0),
        first_step_s=first_s,
        chunk_token_s=work_s / max(chunk - 1.0, 1.0),
        chunk_tokens=chunk,
        step_s=step_s,
        decode_s=decode_s,
        per_row_s=max(more_rows_s - decode_s, 0.0) / _PROBE_ROWS,
        per_kv_s=max(more_kv_s - decode_s, 0.0) / _PROBE_KV,
    )


@dataclass(frozen=True, slots=True)
class Snapshot:
    """A report digested. due_s, service_s `[n]`: pending prompts that are not relegated, by deadline (infinite without
    one), and how long each keeps the worker busy. limit_s `[n]`: due_s, but infinite for those the report only sums up.

    decodes, decode_kv, tightest_tpot_s: those running. pending, pending_kv, pending_tpot_s: the prompts that will run,
    when they are computed. kv_tokens: what is held and what pending prompts still need; relegated_s: work of those put
    behind all others. in_order: whether the engine goes by deadline.
    """

    speed: Speed
    due_s: F8
    limit_s: F8
    service_s: F8
    decodes: int
    decode_kv: float
    tightest_tpot_s: float
    pending: int
    pending_kv: float
    pending_tpot_s: float
    kv_tokens: float
    kv_capacity: float
    relegated_s: float
    rest_s: float
    mean_output: float
    by_deadline: bool


def snapshot(view: WorkerView) -> Snapshot:
    """Of the view's report; of an idle worker where there is none yet."""
    load = view.load or WorkerLoad(covers=0)
    info = view.info
    by_deadline = info.scheduler not in IN_ORDER_OF_ARRIVAL
    if load.pending:
        rows = np.array([(p.deadline_s, p.left_tokens, p.done_tokens, p.tpot_s, p.relegated) for p in load.pending])
        due, left, done, tpot, relegated = rows.T
        due = np.where(np.isnan(due), _INF, due)
    else:
        due = left = done = tpot = relegated = _EMPTY
    kept = relegated == 0.0
    tightest = load.tightest_tpot_s if load.tightest_tpot_s == load.tightest_tpot_s else _INF
    pending_tpot = float(np.fmin.reduce(tpot[kept], initial=_INF))
    rate = speed(
        predictor_of(load.perf),
        load.perf.quantile if load.perf else 1.0,
        load.decodes,
        float(load.decode_kv_tokens),
        min(tightest, pending_tpot),
        info.max_batch_tokens or _BATCH_TOKENS,
        by_deadline,
    )
    service = rate.per_token_s * left + rate.per_pair_s * left * (done + 0.5 * left)
    due, service = due[kept], service[kept]
    limit = due
    pending_kv = float((left + done)[kept].sum())
    unlisted = load.pending_tokens - load.relegated_tokens - float(left[kept].sum())
    if unlisted > 0.5:  # due after all that are listed
        due, limit = np.append(due, due[-1] if len(due) else _INF), np.append(due, _INF)
        service = np.append(service, rate.per_token_s * unlisted)
        pending_kv += unlisted
    block = info.block_size or _BLOCK_TOKENS
    busy_s = rate.step_s if len(due) else rate.decode_s if load.decodes else 0.0
    return Snapshot(
        speed=rate,
        due_s=due,
        limit_s=limit,
        service_s=service,
        decodes=load.decodes,
        decode_kv=float(load.decode_kv_tokens),
        tightest_tpot_s=tightest,
        pending=max(load.running + load.waiting - load.decodes - load.relegated, 0),
        pending_kv=pending_kv,
        pending_tpot_s=pending_tpot,
        kv_tokens=float(load.kv_used_blocks * block) + load.pending_tokens,
        kv_capacity=float(load.kv_total_blocks * block) or _INF,
        relegated_s=rate.per_token_s * load.relegated_tokens,
        rest_s=0.5 * busy_s,
        mean_output=load.mean_output_tokens,
        by_deadline=by_deadline,
    )


@dataclass(frozen=True, slots=True)
class Forecast:
    """A worker's future as far as it is decided, seen from the instant the forecast was made.

    due_s `[n]`: deadlines of the prompts it can serve in time, rising. ahead_s `[n + 1]`: work of the first i of them.
    slack_s `[n + 1]`: by how much those from the i-th on can be put off without any becoming late; infinite at the end.
    late_s: work of prompts that cannot be in time, behind all others. rows, kv: sequences and their KV tokens once
    every prompt is computed; tightest_tpot_s: of them all. kv_tokens: KV needed for what is decided.
    """

    base: Snapshot
    due_s: F8
    ahead_s: F8
    slack_s: F8
    late_s: float
    rows: float
    kv: float
    tightest_tpot_s: float
    kv_tokens: float

    def numbers(self) -> tuple[float, ...]:
        """In the order of FIELDS."""
        b, v = self.base, self.base.speed
        return (
            v.per_token_s,
            v.per_pair_s,
            v.first_step_s,
            v.chunk_token_s,
            v.chunk_tokens,
            b.rest_s,
            self.late_s,
            v.decode_s + v.per_row_s * (self.rows - max(b.decodes, 1)) + v.per_kv_s * (self.kv - b.decode_kv),
            v.per_row_s,
            v.per_kv_s,
            self.tightest_tpot_s,
            self.kv_tokens,
            b.kv_capacity,
            b.mean_output,
        )


FIELDS = (
    "per_token_s",
    "per_pair_s",
    "first_step_s",
    "chunk_token_s",
    "chunk_tokens",
    "rest_s",
    "late_s",
    "decode_s",
    "per_row_s",
    "per_kv_s",
    "tightest_tpot_s",
    "kv_tokens",
    "kv_capacity",
    "mean_output",
)


def forecast(base: Snapshot, view: WorkerView, now: float) -> Forecast:
    """The snapshot and what the view says was dispatched since."""
    v, due, limit, service = base.speed, base.due_s, base.limit_s, base.service_s
    rows, kv = float(base.decodes + base.pending), base.decode_kv + base.pending_kv
    tightest, kv_tokens = min(base.tightest_tpot_s, base.pending_tpot_s), base.kv_tokens
    for r in view.started:
        rows, kv, kv_tokens = rows + 1.0, kv + r.prompt_tokens, kv_tokens + r.prompt_tokens
        tightest = min(tightest, r.slo.tpot_s if r.slo else _INF)
    if view.unreported:
        new_due, new_service = [], []
        for r in view.unreported:
            done = r.cached_tokens.get(view.worker_id, 0)
            left = r.prompt_tokens - done
            new_due.append(r.first_token_due_s)
            new_service.append(left * (v.per_token_s + v.per_pair_s * (done + 0.5 * left)))
            rows, kv, kv_tokens = rows + 1.0, kv + r.prompt_tokens, kv_tokens + left
            tightest = min(tightest, r.slo.tpot_s if r.slo else _INF)
        due, limit, service = np.append(due, new_due), np.append(limit, new_due), np.append(service, new_service)
        if base.by_deadline:
            order = np.argsort(due, kind="stable")
            due, limit, service = due[order], limit[order], service[order]
    late_s = base.relegated_s
    if not base.by_deadline:  # whoever comes waits for all, and delays nobody
        due = np.full(len(due), -_INF)
    ahead = np.zeros(len(due) + 1)
    np.cumsum(service, out=ahead[1:])
    slack = np.full(len(due) + 1, _INF)
    if base.by_deadline and len(due):
        room = limit - (now + base.rest_s)
        if (ahead[1:] > room).any():
            keep = in_time(service, room)
            late_s += float(service[~keep].sum())
            due, service, room = due[keep], service[keep], room[keep]
            ahead, slack = ahead[: len(due) + 1], slack[: len(due) + 1]
            np.cumsum(service, out=ahead[1:])
        np.minimum.accumulate((room - ahead[1:])[::-1], out=slack[-2::-1])
    return Forecast(base, due, ahead, slack, late_s, rows, kv, tightest, kv_tokens)


def in_time(service_s: F8, room_s: F8) -> npt.NDArray[np.bool_]:
    """A largest set of jobs that are all done in time, and of those sets one of least work. Jobs in order of deadline;
    room_s: until then. Moore and Hodgson, Management Science 15 (1968)."""
    keep = np.ones(len(service_s), np.bool_)
    taken: list[tuple[float, int]] = []
    total_s = 0.0
    for i, (service, room) in enumerate(zip(service_s.tolist(), room_s.tolist(), strict=True)):
        heapq.heappush(taken, (-service, i))
        total_s += service
        if total_s > room:
            largest, dropped = heapq.heappop(taken)
            total_s += largest
            keep[dropped] = False
    return keep


def predictor_of(perf: PerfWeights | None) -> Predictor:
    """The model a worker reported; an untaught one where it has reported none."""
    if perf is None or perf.kind != KIND:
        return LinearModel()
    return LinearModel(prior=tuple(perf.weights))  # type: ignore[arg-type]


def lone_service_s(request: PlacementRequest, v: Speed, cached: int = 0) -> float:
    """How long the request's prompt takes with nothing ahead of it."""
    left = request.prompt_tokens - cached
    pairs_s = v.per_pair_s * left * (cached + 0.5 * left)
    return max(left * v.per_token_s, v.first_step_s + min(left, v.chunk_tokens) * v.chunk_token_s) + pairs_s
