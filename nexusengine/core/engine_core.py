"""The engine loop of one device: schedule, execute, apply.

Where the executor can hold two steps (`ExecutorSpec.overlaps`), a step is planned and submitted while the one before it
runs. Submitting moves the columns on as if every sampled row got one more token that does not end it; the token itself
is `pending` until the result is applied. A row that turns out to have ended was computed once in vain. Blocks can be
given away at once even so: the device works in the order of submission, so their next owner writes after the old one.

Owns the requests' tokens and the steps in flight; who runs, with which blocks, is the Scheduler's. Knows neither
sockets nor tensors. Not thread-safe: one thread calls everything, except `load`, which any thread may call at any time.
"""

from __future__ import annotations

import math
import time
from collections import deque
from collections.abc import Callable, Sequence

import numpy as np

from nexusengine.clock import Clock
from nexusengine.core.admission import is_unattainable, longest_output
from nexusengine.core.delivery import Delivery, end_by
from nexusengine.core.deltas import End, Error, Logprobs, Outbox, first_delta, last_delta, next_delta, token_logprobs
from nexusengine.core.first_token import FirstTokens
from nexusengine.core.history import History, record_of
from nexusengine.core.in_flight import InFlightStep
from nexusengine.core.invariants import check_requests
from nexusengine.core.published_load import PublishedLoad
from nexusengine.core.records import newest_steps, request_history
from nexusengine.core.request import RequestState
from nexusengine.core.step_batch import step_batch
from nexusengine.core.timeouts import Timeouts
from nexusengine.errors import DeadlineExceeded, InternalError, InvalidRequest, Overloaded
from nexusengine.execute.base import Executor
from nexusengine.execute.batch import StepBatch, StepResult
from nexusengine.kv.hashing import block_hashes
from nexusengine.kv.manager import KVManager
from nexusengine.perf.features import StepFeatures
from nexusengine.perf.model import PerformanceModel
from nexusengine.sampling.table import SamplingTable
from nexusengine.scheduler.plan import SchedulerPolicy
from nexusengine.scheduler.scheduler import COLD_AFTER_S, Scheduler
from nexusengine.scheduler.stats import CoreStats
from nexusengine.types import EngineRequest, Service, TokenDelta
from nexusengine.wire import DebugQuery, DebugReply, RequestRecord, Split, StepRecord, WorkerLoad, join_deltas

_RECORDS = 4096


class EngineCore:
    """Serves requests on one executor.

    Args:
        executor: computes the steps.
        policy, model: what decides them, and what predicts their duration.
        clock: gives arrival, deadlines and timings their meaning.
        max_running, max_waiting: requests that hold KV, and that wait for it.
        prefix_caching: reuse the KV of equal beginnings.
        hash_key: secret of the prefix cache's hashes.
        name: of this worker, in records and deltas.
        check_every_step: verify every invariant after each step (tests).

    Attributes:
        records: the newest steps.
        last_dispatch_seq: number of the router's newest dispatch that `load` includes.
        on_step: called after each step (e.g. worker.step_recorder); must not block.
    """

    def __init__(
        self,
        executor: Executor,
        policy: SchedulerPolicy,
        model: PerformanceModel,
        *,
        clock: Clock,
        max_running: int = 256,
        max_waiting: int = 1024,
        prefix_caching: bool = True,
        hash_key: bytes = b"",
        name: str = "w0",
        check_every_step: bool = False,
    ) -> None:
        spec, slots = executor.spec, max_running + max_waiting
        self.executor, self.clock, self.name = executor, clock, name
        blocks_each = -(-spec.max_model_len // spec.block_size)
        self.kv = KVManager(spec.num_blocks, spec.block_size, slots, blocks_each, prefix_caching=prefix_caching)
        self.scheduler: Scheduler[RequestState] = Scheduler(
            policy,
            model,
            self.kv,
            max_running=max_running,
            max_waiting=max_waiting,
            max_batch_tokens=spec.max_batch_tokens,
        )
        self.max_model_len = min(spec.max_model_len, self.kv.total_blocks * spec.block_size)
        self.last_dispatch_seq = 0
        self.records: deque[StepRecord] = deque(maxlen=_RECORDS)
        self.on_step: Callable[[StepRecord, StepBatch], None] | None = None
        self._hash_key, self._check_every_step = hash_key, check_every_step
        self._sampling = SamplingTable.empty(slots)
        self._history = History(slots)
        self._by_id: dict[str, RequestState] = {}
        self._in_flight: deque[InFlightStep] = deque()  # oldest first; two at most, and only while `step` runs
        self._timeouts = Timeouts(2 * slots)
        self._outbox = Outbox()  # survives a step that raises, so that no request ends unheard
        self._first_tokens = FirstTokens()
        self._delivery = Delivery(self.scheduler, self._outbox)
        self._published = PublishedLoad(self.kv.total_blocks)
        self._stepped_s, self._idle_since_s = clock.now(), math.inf  # idle: the device, while the core has work
        self._submitted = 0

    # ---- requests in and out -------------------------------------------------------------------------------------

    @property
    def has_work(self) -> bool:
        return bool(self._by_id or self._in_flight)

    @property
    def room(self) -> int:
        """How many requests `add` takes now."""
        return self.scheduler.room

    def request_ids(self) -> list[str]:
        """Of all requests in it; safe from any thread."""
        return list(self._by_id)

    def add(self, request: EngineRequest) -> None:
        """Queue a request. Raises InvalidRequest, ContextTooLong (can never fit) or Overloaded (the queue is full)."""
        state = RequestState.of(request, self.admissible(request))
        if self.room < 1:
            raise Overloaded(
                f"{len(self.scheduler.waiting)} requests are waiting already",
                retry_after_s=self.scheduler.predicted_drain_s(),
            )
        if self.kv.prefix_caching:
            state.block_hashes = block_hashes(state.tokens, self.kv.block_size, self._hash_key)
        state.unattainable = is_unattainable(self.scheduler, state)
        self._first_tokens.arrived(state)
        self.scheduler.add(state)
        self._sampling.set(state.slot, request.sampling)
        state.serial = self._history.arrived(state.slot)
        self._delivery.arrived(state)
        self._by_id[request.request_id] = state
        if request.deadline_s is not None:
            self._timeouts.watch(request.deadline_s, request.request_id, self._by_id)
        self.publish()

    def admissible(self, request: EngineRequest) -> int:
        """The number of output tokens at which the request ends. Raises InvalidRequest or ContextTooLong."""
        if request.request_id in self._by_id:
            raise InvalidRequest(f"a request with id {request.request_id!r} is being served", param="request_id")
        return longest_output(request, self.executor.spec.vocab_size, self.max_model_len)

    def abort(self, request_id: str) -> TokenDelta | None:
        """End a request in whatever state it is; None if there is no such request."""
        state = self._by_id.get(request_id)
        if state is None:
            return None
        self._finish(state, End("abort"))
        return self._outbox.full.pop()

    def fail_all(self, code: str, message: str) -> list[TokenDelta]:
        """End every request with an error; what a step that raised had not delivered comes before."""
        for state in list(self._by_id.values()):
            self._fail(state, code, message)
        return join_deltas(*self._outbox.take())

    # ---- one step ------------------------------------------------------------------------------------------------

    def step(self) -> list[TokenDelta]:
        """As `step_split`, but each delta whole."""
        return join_deltas(*self.step_split())

    def step_split(self) -> Split:
        """Compute one step and return the new tokens, as they travel; returns at once when there is nothing to do.

        Where steps overlap, submits one and returns the tokens of the one before: none at first.

        Raises:
            InternalError: the policy broke its contract. What the executor raises passes through.
        """
        now = self.clock.now()
        self._expire(now)
        submitted = self._submit_next(now)
        if not self._in_flight:
            self.publish(force=not self._by_id)
        elif not (submitted and self.executor.spec.overlaps and len(self._in_flight) == 1):
            self._collect()
        return self._outbox.take()

    def _submit_next(self, now: float) -> bool:
        """Plan a step and hand it to the executor; False if there is nothing that it could compute yet."""
        if not self.scheduler.can_plan:
            return False
        began_s, stats = time.perf_counter(), self.scheduler.stats
        preemptions = stats.preemptions
        scheduled = self.scheduler.schedule(now, in_flight=bool(self._in_flight))
        self._refuse(scheduled.refused)
        self._first_tokens.planned(self.scheduler, scheduled, self._in_flight, now)
        if not len(scheduled.slots):
            return False
        plan, number = scheduled.plan, self._submitted + 1
        batch = step_batch(self.scheduler, scheduled, self._delivery.newest, self._sampling)
        self._published.step_planned(number, plan.upper_s)
        step = InFlightStep(
            number=number,
            plan=plan,
            batch=batch,
            features=StepFeatures.of(batch.counts, batch.starts),
            states=tuple(map(self.scheduler.requests.__getitem__, batch.slots.tolist())),
            releases=self.kv.releases[batch.slots],
            started_s=now,
            planning_s=time.perf_counter() - began_s,
            preempted=stats.preemptions - preemptions,
            cold=not self._in_flight and now - self._stepped_s > COLD_AFTER_S,
        )
        if not self._in_flight:
            self._published.step_started(now)
        stats.host_s += max(self.clock.now() - self._idle_since_s, 0.0)
        try:
            self.executor.submit(batch)
        except BaseException:
            self._published.step_started(None)
            raise
        self._submitted = number
        self._history.planned(number, now, plan.reasons, batch.slots, batch.counts)
        self._in_flight.append(step)
        self._advance(step)
        return True

    def _refuse(self, states: Sequence[RequestState]) -> None:
        for state in states:
            message = "refused: the engine cannot serve it in time"
            error = Error(Overloaded.code, message, self.scheduler.predicted_drain_s())
            self._ended(state, End("error", error=error))

    def _advance(self, step: InFlightStep) -> None:
        """Move every row on by what the step computes; a sampled row has one more token, which nobody knows yet."""
        c, batch = self.scheduler.columns, step.batch
        sampled = self.scheduler.advance(batch.slots, batch.counts)
        expected_s, generated = step.expected_end_s, c.generated_tokens[sampled]
        # until the tokens are there, so that a policy has something to go by
        c.first_token_s[sampled[generated == 1]] = expected_s
        c.last_token_s[sampled] = expected_s
        self._delivery.expect(sampled)
        for slot in sampled[generated == c.max_tokens[sampled]].tolist():
            self.scheduler.end_soon(slot)

    def _collect(self) -> None:
        """Wait for the oldest step in flight and do what it leads to."""
        try:
            result = self.executor.collect()
        except BaseException:
            self._in_flight.clear()
            self._published.step_started(None)
            raise
        step, collected_s = self._in_flight.popleft(), time.perf_counter()
        self._idle_since_s = math.inf if self._in_flight else self.clock.now()
        self._published.step_started(self.clock.now() if self._in_flight else None)
        self._apply(step, result)
        stats = self.scheduler.stats
        stats.stepped(step.features.tokens, step.plan.predicted_s, step.plan.upper_s, result.device_s)
        model = self.scheduler.model
        (model.observe_cold if step.cold else model.observe)(step.features, result.device_s)
        self._stepped_s = self.clock.now()
        self.publish(force=not self._by_id)
        if self._check_every_step:
            self.check()
        scheduler_s = step.planning_s + time.perf_counter() - collected_s
        stats.scheduler_s += scheduler_s
        self.records.append(step.record(self.scheduler, result.device_s, scheduler_s))
        if self.on_step is not None:
            self.on_step(self.records[-1], step.batch)

    def _apply(self, step: InFlightStep, result: StepResult) -> None:
        """Append what was sampled, name the blocks that are full, and end what is at its end."""
        batch, tokens, now = step.batch, result.token_ids, self.clock.now()
        rows = batch.sampled.nonzero()[0]
        if len(rows) != len(tokens):
            raise InternalError(f"{len(rows)} rows were to be sampled, the executor returned {len(tokens)}")
        if np.count_nonzero(tokens < 0):
            self._fail_not_finite([step.states[i] for i in rows[tokens < 0].tolist()])
        holds = self.kv.releases[batch.slots] == step.releases
        if self.kv.prefix_caching:
            size, ends = self.kv.block_size, batch.starts + batch.counts
            full = ((batch.starts // size != ends // size) & holds).nonzero()[0]
            for i, end in zip(full.tolist(), ends[full].tolist(), strict=True):
                self._commit(step.states[i], end)
        sampled = np.arange(len(rows))
        if np.count_nonzero(holds) < len(holds):  # others have failed above or ended meanwhile: computed in vain
            sampled = sampled[[self._serves(step.states[i]) for i in rows.tolist()]]
            rows, tokens = rows[sampled], tokens[sampled]
        logprobs = result.logprobs
        special = self._delivery.deliver(step, rows, sampled, tokens, now, logprobs=logprobs is not None)
        for state, token, row in special:
            self._deliver(state, token, None if logprobs is None else token_logprobs(logprobs, row, token, state), now)

    def _deliver(self, state: RequestState, token: int, logprobs: Logprobs, now: float) -> None:
        """Say more of a request and the token that it has just got."""
        if state.first_token_s is None:
            state.first_token_s = self.scheduler.columns.first_token_s[state.slot] = now
            self._first_tokens.came(state, now)
        end = end_by(state, token, logprobs)
        if end is not None:
            self._finish(state, end)
        elif state.output_tokens == 1:
            self._outbox.full.append(first_delta(state, self._service(state), token, logprobs))
        else:
            self._outbox.full.append(next_delta(state, token, logprobs))

    def _fail_not_finite(self, states: Sequence[RequestState]) -> None:
        for state in filter(self._serves, states):
            # Discarded: every later request with this beginning would meet the same numbers in the prefix cache.
            self._fail(state, InternalError.code, "the model's logits were not finite", discard=True)

    def _serves(self, state: RequestState) -> bool:
        return self.scheduler.requests.get(state.slot) is state

    def _commit(self, state: RequestState, computed: int) -> None:
        size, hashes = self.kv.block_size, state.block_hashes
        have = len(hashes)
        if computed // size > have:
            previous = hashes[-1] if have else b""
            hashes += block_hashes(state.tokens[have * size : computed], size, self._hash_key, previous)
        self.scheduler.commit(state, computed)

    # ---- ends ----------------------------------------------------------------------------------------------------

    def _finish(self, state: RequestState, end: End, *, discard: bool = False) -> None:
        """End a request and put its last delta into the outbox. discard: what it computed may be wrong."""
        self.scheduler.finish(state, output_tokens=state.output_tokens, complete=end.complete, discard=discard)
        self._ended(state, end)

    def _fail(self, state: RequestState, code: str, message: str, *, discard: bool = False) -> None:
        self._finish(state, End("error", error=Error(code, message)), discard=discard)

    def _ended(self, state: RequestState, end: End) -> None:
        """The scheduler has let go of it: send its last delta, and remember it."""
        del self._by_id[state.request.request_id]
        self._idle_since_s = self._idle_since_s if self._by_id else math.inf
        self.scheduler.stats.finished(end.reason)
        now, service = self.clock.now(), self._service(state)
        record = record_of(state, service, now, end.reason, end.error.message if end.error else None)
        self._history.ended(state.slot, state.serial, record)
        self._outbox.full.append(last_delta(state, service, now, end))

    def _service(self, state: RequestState) -> Service:
        strict = bool(self.scheduler.strict[state.slot])
        return Service(self.name, state.predicted_ttft_s, state.unattainable, strict)

    def _expire(self, now: float) -> None:
        for deadline_s, request_id in self._timeouts.expired(now):
            state = self._by_id.get(request_id)
            if state is not None and state.request.deadline_s == deadline_s:
                message = f"not finished within {deadline_s - state.request.arrival_s:.1f} s of its arrival"
                self._fail(state, DeadlineExceeded.code, message)

    # ---- what others see -----------------------------------------------------------------------------------------

    def stats(self) -> CoreStats:
        """A picture of the counters and the present numbers."""
        return self.scheduler.counters()

    def debug_reply(self, query: DebugQuery) -> DebugReply:
        """The newest steps, and what is remembered of a request that is here or was not long ago."""
        found = None
        if query.request_id is not None and (known := self._known(query.request_id)) is not None:
            serial, record = known
            found = request_history(record, self._history.changes(serial), self.records, self.clock.now())
        return DebugReply(query.client, query.query, self.name, newest_steps(self.records, query.last_steps), found)

    def _known(self, request_id: str) -> tuple[int, RequestRecord] | None:
        """The number in the history and the record of a request."""
        state = self._by_id.get(request_id)
        if state is None:
            return self._history.ended_record(request_id)
        return state.serial, record_of(state, self._service(state))

    def load(self) -> WorkerLoad:
        """The newest published picture, at most about 20 ms older than the last step. Safe from any thread."""
        return self._published.read(self.clock.now())

    def publish(self, force: bool = False) -> None:
        """Renew the load that other threads see. force: although it is hardly older than it may be."""
        self._published.publish(lambda: self.scheduler.load(self.last_dispatch_seq), self.clock.now(), force=force)

    def check(self) -> None:
        """Raises InternalError or KVError naming the first invariant that does not hold."""
        self.scheduler.check()
        check_requests(
            self.scheduler,
            self._by_id,
            self._in_flight,
            self._delivery,
            self.max_model_len,
            self._hash_key,
        )
