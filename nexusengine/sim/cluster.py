"""A whole server on a virtual clock: arrivals, the real router core, simulated engines, delays between them.

The router core and its ledger, registry and placement policy are those of the router process; messages that would cross
a socket are delivered after `link_delay_s`. Of a request's tokens only the first and the last are reported.
"""

from __future__ import annotations

import heapq
import itertools
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import msgspec
import numpy as np

from nexusengine.errors import InternalError
from nexusengine.router.core import RouterCore, identity_of
from nexusengine.router.policy import PlacementPolicy
from nexusengine.sim.engine import Ended, SimEngine
from nexusengine.sim.job import Job
from nexusengine.types import TokenDelta
from nexusengine.wire import (
    Cancel,
    Deltas,
    Dispatch,
    Hello,
    Ready,
    Report,
    Starting,
    Submit,
    WorkerDeltas,
    WorkerInfo,
)

_CLIENT = b"client"
_EPOCH = "sim"


@dataclass(frozen=True, slots=True)
class LinkSettings:
    """link_delay_s: of every message between router and engine, and between client and router. snapshot_period_s:
    between reports of a worker's load; loss: share of reports that do not arrive."""

    link_delay_s: float = 0.0005
    snapshot_period_s: float = 0.1
    loss: float = 0.0


@dataclass(frozen=True, slots=True)
class Outcome:
    """What became of a job. All instants are those of the client; NaN where there is none. worker: who ended it."""

    job: Job
    ended: Ended | None
    worker: str | None
    dropped_s: float = float("nan")


@dataclass(frozen=True, slots=True)
class Fault:
    """At `at_s` a worker becomes `slowdown` times slower, crashes (0: its process restarts and is ready after
    `restart_s`), or joins late (down from the beginning until `at_s`)."""

    at_s: float
    worker: int
    kind: str  # "slow", "crash" or "join"
    slowdown: float = 1.0
    restart_s: float = 10.0


class Worker:
    """An engine and its place in the event queue."""

    def __init__(self, index: int, engine: SimEngine, info: WorkerInfo) -> None:
        self.index, self.engine, self.info = index, engine, info
        self.identity = identity_of(info.worker_id, info.epoch)
        self.version = 0
        self.report_seq = 0
        self.up = True
        self.restarts = 0


class Cluster:
    """Runs jobs to their end. progress is called now and then with (virtual seconds, jobs ended)."""

    def __init__(
        self,
        engines: Sequence[SimEngine],
        policy: PlacementPolicy,
        link: LinkSettings,
        rng: np.random.Generator,
        *,
        faults: Sequence[Fault] = (),
        progress: Callable[[float, int], None] = lambda now_s, ended: None,
    ) -> None:
        self.link, self._rng, self._progress = link, rng, progress
        infos = [
            WorkerInfo(f"w{i}", _EPOCH, 0, e.profile.name, e.profile.model, max_model_len=e.max_model_len)
            for i, e in enumerate(engines)
        ]
        self.core = RouterCore(policy, infos, epoch=_EPOCH, max_held=1_000_000)
        self.workers = [Worker(i, e, info) for i, (e, info) in enumerate(zip(engines, infos, strict=True))]
        self.outcomes: dict[str, Outcome] = {}
        self.on_sample: Callable[[float], None] | None = None
        self._by_identity = {w.identity: w for w in self.workers}
        self._jobs: dict[str, Job] = {}
        self._events: list[tuple[float, int, Callable[..., None], tuple[Any, ...]]] = []
        self._order = itertools.count()
        self._open = 0
        for fault in faults:
            if fault.kind == "join":
                self.workers[fault.worker].up = False
            self._at(fault.at_s, self._fault, fault)

    def run(self, jobs: Sequence[Job]) -> list[Outcome]:
        """The outcomes in the order of `jobs`, those of closed loops behind them. Jobs in order of arrival."""
        self._open = len(jobs)
        for worker in self.workers:
            if worker.up:
                self._connect(0.0, worker)
        arrivals = iter(jobs)
        self._next_arrival(0.0, arrivals, first=True)
        self._at(0.0, self._timer)
        count = 0
        while self._open and self._events:
            now, _, call, args = heapq.heappop(self._events)
            call(now, *args)
            count += 1
            if count % 5000 == 0:
                self._progress(now, len(self.outcomes))
        if self._open:
            raise InternalError(f"{self._open} jobs never ended")
        return list(self.outcomes.values())

    # ---- events --------------------------------------------------------------------------------------------------

    def _at(self, at_s: float, call: Callable[..., None], *args: Any) -> None:
        heapq.heappush(self._events, (at_s, next(self._order), call, args))

    def _next_arrival(self, now: float, arrivals: Any, job: Job | None = None, *, first: bool = False) -> None:
        if not first:
            assert job is not None
            self._submit(now, job)
        following = next(arrivals, None)
        if following is not None:
            self._at(following.request.arrival_s, self._next_arrival, arrivals, following)

    def _submit(self, now: float, job: Job) -> None:
        self._jobs[job.request.request_id] = job
        self.outcomes[job.request.request_id] = Outcome(job, None, None)
        self._at(now + self.link.link_delay_s, self._to_router, None, Submit(job.request))

    def _to_router(self, now: float, worker: Worker | None, message: Any) -> None:
        if worker is None:
            self.core.on_client(_CLIENT, message, now)
        else:
            self.core.on_worker(worker.identity, message, now)
        self._flush(now)

    def _flush(self, now: float) -> None:
        for out in self.core.take():
            message = out.message
            if isinstance(message, Deltas):
                for delta in message.full:
                    self._answered(now, delta)
            elif isinstance(message, Dispatch | Cancel):
                self._at(now + self.link.link_delay_s, self._to_worker, self._by_identity[out.identity], message)

    def _to_worker(self, now: float, worker: Worker, message: Dispatch | Cancel) -> None:
        if not worker.up:
            return
        engine = worker.engine
        engine.advance(now)
        if isinstance(message, Cancel):
            engine.abort(message.request_id)
        else:
            engine.covers = message.seq
            engine.add(self._jobs[message.request.request_id], now)
        self._after_change(now, worker)

    def _after_change(self, now: float, worker: Worker) -> None:
        """Something came to the worker: its run is cut short, or it wakes up."""
        worker.version += 1
        until_s = worker.engine.interrupt()
        self._report_tokens(now, worker)
        if until_s is None:
            until_s = worker.engine.begin(now)
            self._report_tokens(now, worker)
        if until_s is not None:
            self._at(until_s, self._step_ended, worker, worker.version)

    def _step_ended(self, now: float, worker: Worker, version: int) -> None:
        if version != worker.version:
            return
        worker.engine.advance(now)
        self._report_tokens(now, worker)
        until_s = worker.engine.begin(now)
        self._report_tokens(now, worker)  # what the plan refused
        if until_s is not None:
            self._at(until_s, self._step_ended, worker, version)

    def _report_tokens(self, now: float, worker: Worker) -> None:
        engine = worker.engine
        if not (engine.first_tokens or engine.ended):
            return
        first, engine.first_tokens = engine.first_tokens, []
        ended, engine.ended = engine.ended, []
        deltas = [TokenDelta(job.request.request_id, (0,)) for job in first]
        for end in ended:
            request_id = end.job.request.request_id
            self.outcomes[request_id] = Outcome(end.job, end, worker.info.worker_id)
            deltas.append(TokenDelta(request_id, finish_reason="error" if end.refused else "length"))
        plain = tuple((d.request_id, d.token_ids) for d in deltas if d.finish_reason is None)
        full = tuple(d for d in deltas if d.finish_reason is not None)
        message = WorkerDeltas(_EPOCH, plain, full)
        self._at(now + self.link.link_delay_s, self._to_router, worker, message)

    def _answered(self, now: float, delta: TokenDelta) -> None:
        """The client gets a last delta: from an engine, or from the router itself."""
        job = self._jobs.pop(delta.request_id, None)
        if job is None:
            return
        self._open -= 1
        if self.outcomes[delta.request_id].ended is None:
            self.outcomes[delta.request_id] = replace(self.outcomes[delta.request_id], dropped_s=now)
        if job.then is not None:
            self._open += 1
            at_s = now + job.think_s
            request = replace(job.then.request, arrival_s=at_s)
            self._at(at_s, self._submit, replace(job.then, request=request))

    def _timer(self, now: float) -> None:
        self.core.on_client(_CLIENT, Hello(), now)
        self.core.on_timer(now)
        self._flush(now)
        if self.on_sample is not None:
            for worker in self.workers:
                worker.engine.advance(now)
                self._report_tokens(now, worker)
            self.on_sample(now)
        self._at(now + self.link.snapshot_period_s, self._timer)

    def _report(self, now: float, worker: Worker, restarts: int) -> None:
        if restarts != worker.restarts or not worker.up:
            return
        worker.engine.advance(now)
        self._report_tokens(now, worker)
        worker.report_seq += 1
        if self.link.loss == 0.0 or self._rng.random() >= self.link.loss:
            report = Report(_EPOCH, worker.report_seq, worker.engine.load(now))
            self._at(now + self.link.link_delay_s, self._to_router, worker, report)
        self._at(now + self.link.snapshot_period_s, self._report, worker, restarts)

    # ---- life and death ------------------------------------------------------------------------------------------

    def _connect(self, now: float, worker: Worker) -> None:
        self.core.on_worker(worker.identity, Starting(worker.info, "starting", 0.0), now)
        self.core.on_worker(worker.identity, Ready(worker.info), now)
        self._flush(now)
        self._at(now, self._report, worker, worker.restarts)

    def _fault(self, now: float, fault: Fault) -> None:
        worker = self.workers[fault.worker]
        if fault.kind == "slow":
            worker.engine.slowdown = fault.slowdown
        elif fault.kind == "crash":
            worker.engine.advance(now)
            self._report_tokens(now, worker)
            worker.engine.drop_all()
            worker.up, worker.version, worker.restarts = False, worker.version + 1, worker.restarts + 1
            self.core.on_worker_exited(worker.info.worker_id, worker.info.epoch, "crashed", worker.restarts, now)
            self._flush(now)
            self._at(now + fault.restart_s, self._fault, replace(fault, at_s=now + fault.restart_s, kind="join"))
        else:
            worker.up = True
            worker.info = msgspec.structs.replace(worker.info, epoch=f"{_EPOCH}{worker.restarts}")
            worker.identity = identity_of(worker.info.worker_id, worker.info.epoch)
            self._by_identity[worker.identity] = worker
            self._connect(now, worker)
