"""A whole server on a virtual clock: arrivals, the real router core, simulated engines, delays between them.

The router core and its ledger, registry and placement policy are those of the router process; messages that would cross
a socket are delivered after `link_delay_s`. Of a request's tokens only the first and the last are reported.
"""

from __future__ import annotations

import heapq
import itertools
import math
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from nexusengine.errors import InternalError, Overloaded
from nexusengine.router.core import RouterCore
from nexusengine.router.placement.policy import PlacementPolicy
from nexusengine.sim.engine import Ended, SimEngine
from nexusengine.sim.faults import Fault
from nexusengine.sim.job import Job
from nexusengine.sim.worker import EPOCH, SimWorker
from nexusengine.types import TokenDelta
from nexusengine.wire import (
    Cancel,
    Deltas,
    Dispatch,
    Hello,
    Message,
    Ready,
    RepeatPrefixes,
    Report,
    Starting,
    Submit,
    WorkerDeltas,
)

_CLIENT = b"client"
_PROGRESS_EVERY_EVENTS = 2000
_HELLO_PERIOD_S = 1.0
_IDLE_TICKED_S = 30.0
"""For so long without any request the clock goes on tick by tick, until the router's moving means have settled; then
it jumps to the next event."""
HOPS = 2
"""Links on the way of a token: engine to router, router to client."""


@dataclass(frozen=True, slots=True)
class LinkSettings:
    """What lies between the processes of the simulated server.

    Attributes:
        link_delay_s: of every message between router and engine, and between client and router.
        snapshot_period_s: between reports of a worker's load.
        loss: share of reports that do not arrive.
    """

    link_delay_s: float = 0.0005
    snapshot_period_s: float = 0.1
    loss: float = 0.0


@dataclass(frozen=True, slots=True)
class Outcome:
    """What became of a job, as its client saw it; timestamps are the client's, NaN where there is none.

    ended: the engine's own account if the job came to its end there; else error says why not ("unfinished": the
    simulation was over before). worker: who had it last.
    """

    job: Job
    first_token_s: float = math.nan
    last_s: float = math.nan
    ended: Ended | None = None
    error: str | None = "unfinished"
    worker: str | None = None


class Cluster:
    """Runs jobs to their end, or until `until_s`.

    engines: one maker a worker; it is called again when the worker's process is started anew. last_arrival_s: after
    this time no session of a closed loop goes on. timeout_s: after which a request is given up. progress is called
    now and then with (virtual seconds, jobs ended). enough: asked after each end; the run stops when it says True.
    """

    def __init__(
        self,
        engines: Sequence[Callable[[], SimEngine]],
        policy: PlacementPolicy,
        link: LinkSettings,
        rng: np.random.Generator,
        *,
        faults: Sequence[Fault] = (),
        until_s: float = math.inf,
        last_arrival_s: float = math.inf,
        timeout_s: float | None = None,
        max_held: int = 4096,
        progress: Callable[[float, int], None] = lambda now_s, ended: None,
        enough: Callable[[Outcome], bool] = lambda outcome: False,
        sample: Callable[[float, Cluster], None] | None = None,
        sample_period_s: float = 1.0,
    ) -> None:
        self.link, self.until_s, self._last_arrival_s, self._timeout_s = link, until_s, last_arrival_s, timeout_s
        self._rng, self._progress, self._enough = rng, progress, enough
        self._sample, self._sample_period_s = sample, sample_period_s
        self.workers = [SimWorker(i, make_engine) for i, make_engine in enumerate(engines)]
        self.core = RouterCore(
            policy,
            [w.info for w in self.workers],
            epoch=EPOCH,
            max_held=max_held,
            report_period_s=link.snapshot_period_s,
            block_hashes=lambda request, size: self._jobs[request.request_id].block_names(size),
        )
        self.outcomes: dict[str, Outcome] = {}
        self.placing_s: list[float] = []
        self.now = 0.0
        self.stopped_early = False
        self._by_identity: dict[bytes, SimWorker] = {}  # those that are up
        self._jobs: dict[str, Job] = {}
        self._sent: dict[str, tuple[Ended, str]] = {}  # last deltas on their way
        self._events: list[tuple[float, int, Callable[..., None], tuple[Any, ...]]] = []
        self._order = itertools.count()
        self._open = 0
        self._ended = 0
        self._idle_since_s = math.inf
        for fault in faults:
            if fault.kind == "join":
                self.workers[fault.worker].up = False
            self._at(fault.at_s, self._fault, fault)

    def run(self, jobs: Sequence[Job]) -> list[Outcome]:
        """One outcome a job, closed loops' included, in order of arrival. `jobs` in order of arrival."""
        self._open = len(jobs)
        for worker in self.workers:
            if worker.up:
                self._connect(0.0, worker)
        self._next_arrival(0.0, iter(jobs), None)
        self._at(0.0, self._timer)
        self._at(0.0, self._hello)
        if self._sample is not None:
            self._at(0.0, self._take_sample)
        count = 0
        while self._open and not self.stopped_early:
            at_s, _, call, args = heapq.heappop(self._events)
            if at_s > self.until_s:
                self.now = self.until_s
                break
            self.now = at_s
            call(at_s, *args)
            count += 1
            if count % _PROGRESS_EVERY_EVENTS == 0:
                self._progress(at_s, self._ended)
        for at_s, _, call, args in sorted(self._events, key=lambda event: event[:2]):
            if call == self._to_worker:  # what is on its way still arrives, so that nothing is left behind
                call(at_s, *args)
        for job in jobs:
            if job.request.request_id not in self.outcomes:
                if not self.stopped_early:
                    raise InternalError(f"{job.request.request_id} arrives after the end, {self.until_s} s")
                self.outcomes[job.request.request_id] = Outcome(job)
        return list(self.outcomes.values())

    # ---- events --------------------------------------------------------------------------------------------------

    def _at(self, at_s: float, call: Callable[..., None], *args: Any) -> None:
        heapq.heappush(self._events, (at_s, next(self._order), call, args))

    def _next_arrival(self, now: float, arrivals: Iterator[Job], job: Job | None) -> None:
        if job is not None:
            self._submit(now, job)
        following = next(arrivals, None)
        if following is not None:
            self._at(following.request.arrival_s, self._next_arrival, arrivals, following)

    def _submit(self, now: float, job: Job) -> None:
        request_id = job.request.request_id
        if request_id in self.outcomes:
            raise InternalError(f"two jobs are called {request_id!r}")
        request = job.request
        if self._timeout_s is not None:
            request = replace(request, deadline_s=now + self._timeout_s)
        self._jobs[request_id] = job
        self.outcomes[request_id] = Outcome(job)
        self._at(now + self.link.link_delay_s, self._submitted, Submit(request))

    def _submitted(self, now: float, message: Submit) -> None:
        began_s = time.perf_counter()
        self.core.on_client(_CLIENT, message, now)
        self.placing_s.append(time.perf_counter() - began_s)
        self._flush(now)

    def _to_router(self, now: float, identity: bytes, message: Any) -> None:
        self.core.on_worker(identity, message, now)
        self._flush(now)

    def _flush(self, now: float) -> None:
        for out in self.core.take():
            message = out.message
            if isinstance(message, Deltas):
                for request_id, _ in message.plain:
                    self._streams(now, request_id)
                for delta in message.full:
                    self._answered(now, delta)
            elif isinstance(message, Dispatch | Cancel | RepeatPrefixes):
                self._at(now + self.link.link_delay_s, self._to_worker, out.identity, message)

    def _to_worker(self, now: float, identity: bytes, message: Message) -> None:
        worker = self._by_identity.get(identity)
        if worker is None:  # that process has ended
            return
        if isinstance(message, RepeatPrefixes):
            assert worker.prefixes is not None
            worker.prefixes.start_over()
            return
        engine = worker.engine
        engine.advance(now)
        if isinstance(message, Cancel):
            engine.abort(message.request_id)
        elif isinstance(message, Dispatch):
            engine.last_dispatch_seq = message.seq
            job = self._jobs.get(message.request.request_id)
            if job is not None:
                engine.add(job, now)
        self._after_change(now, worker)

    def _after_change(self, now: float, worker: SimWorker) -> None:
        """Something came to the worker: its run is cut short, or it wakes up."""
        worker.version += 1
        until_s = worker.engine.interrupt()
        self._report_tokens(now, worker)
        if until_s is None:
            until_s = worker.engine.begin(now)
            self._report_tokens(now, worker)
        if until_s is not None:
            self._at(until_s, self._step_ended, worker, worker.version)

    def _step_ended(self, now: float, worker: SimWorker, version: int) -> None:
        if version != worker.version:
            return
        worker.engine.advance(now)
        self._report_tokens(now, worker)
        until_s = worker.engine.begin(now)
        self._report_tokens(now, worker)  # what the plan refused
        if until_s is not None:
            self._at(until_s, self._step_ended, worker, version)

    def _report_tokens(self, now: float, worker: SimWorker) -> None:
        engine = worker.engine
        if not (engine.first_tokens or engine.ended):
            return
        first, engine.first_tokens = engine.first_tokens, []
        ended, engine.ended = engine.ended, []
        full = [TokenDelta(job.request.request_id, (0,), cached_tokens=cached) for job, _, cached in first]
        for end in ended:
            request_id = end.job.request.request_id
            self._sent[request_id] = end, worker.info.worker_id
            if end.refused:
                full.append(TokenDelta.failed(request_id, Overloaded("refused")))
            else:
                full.append(TokenDelta(request_id, finish_reason="length"))
        message = WorkerDeltas((), tuple(full))
        self._at(now + self.link.link_delay_s, self._to_router, worker.identity, message)

    def _streams(self, now: float, request_id: str) -> None:
        """The client gets its first token."""
        outcome = self.outcomes[request_id]
        self.outcomes[request_id] = replace(outcome, first_token_s=now + self.link.link_delay_s)

    def _answered(self, now: float, delta: TokenDelta) -> None:
        """The client gets a last delta, from an engine or from the router itself; or a first one that says more."""
        if delta.finish_reason is None:
            self._streams(now, delta.request_id)
            return
        job = self._jobs.pop(delta.request_id, None)
        if job is None:
            raise InternalError(f"{delta.request_id} was ended twice")
        outcome, answered_s = self.outcomes[delta.request_id], now + self.link.link_delay_s
        ended, worker = self._sent.pop(delta.request_id, (None, None))
        if delta.finish_reason == "length" and ended is not None:
            outcome = replace(outcome, last_s=answered_s, ended=ended, error=None, worker=worker)
        else:
            ended = ended if ended is not None and ended.refused else None  # else: what a lost process had to say
            outcome = replace(outcome, last_s=answered_s, ended=ended, error=delta.error_code, worker=worker)
        self.outcomes[delta.request_id] = outcome
        self._open -= 1
        self._ended += 1
        self.stopped_early = self.stopped_early or self._enough(outcome)
        then, at_s = job.then, answered_s + job.think_s
        if then is not None and at_s <= self._last_arrival_s:
            self._open += 1
            self._at(at_s, self._submit, replace(then, request=replace(then.request, arrival_s=at_s)))

    def _timer(self, now: float) -> None:
        self.core.on_timer(now)
        self._flush(now)
        self._at(now + self.link.snapshot_period_s, self._timer)
        if self._jobs:
            self._idle_since_s = math.inf
        elif self._idle_since_s == math.inf:
            self._idle_since_s = now
        elif now - self._idle_since_s >= _IDLE_TICKED_S:
            self._skip_idle(now)

    def _skip_idle(self, now: float) -> None:
        """Move what recurs to the next event, where the router is told what it would have heard last.

        Reports on their way are delivered at once.
        """
        periods_s = {
            self._timer: self.link.snapshot_period_s,
            self._report: self.link.snapshot_period_s,
            self._hello: _HELLO_PERIOD_S,
        }
        reports = [e for e in self._events if e[2] == self._to_router and isinstance(e[3][1], Report)]
        rest = [e for e in self._events if e not in reports]
        resume_s = min((at_s for at_s, _, call, _ in rest if call not in periods_s), default=self.until_s)
        resume_s = min(resume_s, self.until_s)
        if resume_s - now <= _IDLE_TICKED_S:
            return
        for _, _, _, (identity, report) in sorted(reports, key=lambda e: e[:2]):
            self.core.on_worker(identity, report, now)
        self._events = []
        for at_s, order, call, args in rest:
            if call in periods_s and at_s < resume_s:
                at_s += math.ceil((resume_s - at_s) / periods_s[call]) * periods_s[call]
            self._events.append((at_s, order, call, args))
        heapq.heapify(self._events)
        self.core.on_client(_CLIENT, Hello(), resume_s)
        for identity, worker in self._by_identity.items():
            self.core.on_worker(identity, worker.report(resume_s), resume_s)
        self._flush(resume_s)

    def _hello(self, now: float) -> None:
        self.core.on_client(_CLIENT, Hello(), now)
        self._flush(now)
        self._at(now + _HELLO_PERIOD_S, self._hello)

    def _take_sample(self, now: float) -> None:
        assert self._sample is not None
        for worker in self.workers:
            if worker.up:
                worker.engine.advance(now)
                self._report_tokens(now, worker)
        self._sample(now, self)
        self._at(now + self._sample_period_s, self._take_sample)

    def _report(self, now: float, worker: SimWorker, identity: bytes) -> None:
        if identity not in self._by_identity:
            return
        worker.engine.advance(now)
        self._report_tokens(now, worker)
        report = worker.report(now)
        if self.link.loss == 0.0 or self._rng.random() >= self.link.loss:
            self._at(now + self.link.link_delay_s, self._to_router, identity, report)
        self._at(now + self.link.snapshot_period_s, self._report, worker, identity)

    # ---- life and death ------------------------------------------------------------------------------------------

    def _connect(self, now: float, worker: SimWorker) -> None:
        self._by_identity[worker.identity] = worker
        self.core.on_worker(worker.identity, Starting(worker.info, "starting", 0.0), now)
        self.core.on_worker(worker.identity, Ready(worker.info), now)
        self._flush(now)
        self._at(now, self._report, worker, worker.identity)

    def _fault(self, now: float, fault: Fault) -> None:
        worker = self.workers[fault.worker]
        if fault.kind == "slow":
            worker.slowdown = fault.slowdown
            if worker.up:
                worker.engine.advance(now)
                worker.engine.slowdown = fault.slowdown
                self._after_change(now, worker)
        elif fault.kind == "crash":
            if worker.up:
                self._crash(now, worker)
                self._at(now + fault.restart_s, self._start, worker)
        else:
            self._start(now, worker)

    def _crash(self, now: float, worker: SimWorker) -> None:
        worker.engine.advance(now)
        self._report_tokens(now, worker)
        worker.up, worker.version = False, worker.version + 1
        del self._by_identity[worker.identity]
        info = worker.info
        worker.restart()
        self.core.on_worker_exited(info.worker_id, info.epoch, "crashed", worker.restarts, now)
        self._flush(now)

    def _start(self, now: float, worker: SimWorker) -> None:
        if not worker.up:
            worker.up = True
            self._connect(now, worker)
