"""The engine loop of one device: plan, place, execute, apply.

Where the executor can hold two steps (`ExecutorSpec.overlaps`), a step is planned and submitted while the one before it
runs. Submitting moves the columns on as if every sampled row got one more token that does not end it; the token itself
is `pending` until the result is applied. A row that turns out to have ended was computed once in vain. Blocks can be
given away at once even so: the device works in the order of submission, so their next owner writes after the old one.

Owns the requests, the columns a policy sees, and the KV accounting; knows neither sockets nor tensors. Not thread-safe:
one thread calls everything, except `load`, which any thread may call at any time.
"""

from __future__ import annotations

import dataclasses
import heapq
import math
import time
from collections import OrderedDict, deque
from collections.abc import Callable, Iterable

import msgspec
import numpy as np

from nexusengine.arrays import F8, I4
from nexusengine.clock import Clock
from nexusengine.core.admission import first_token_in_s, longest_output, unattainable
from nexusengine.core.history import History, life_of
from nexusengine.core.in_flight import Flight
from nexusengine.core.records import request_history, step_histories
from nexusengine.core.request import RequestState
from nexusengine.errors import DeadlineExceeded, InternalError, InvalidRequest, Overloaded
from nexusengine.execute.base import Executor
from nexusengine.execute.batch import PENDING, StepBatch, StepResult
from nexusengine.kv.hashing import block_hashes
from nexusengine.kv.manager import KVManager
from nexusengine.perf.features import StepFeatures
from nexusengine.perf.model import PerformanceModel
from nexusengine.sampling.table import SampledLogprobs, SamplingTable
from nexusengine.scheduler.lens.deadlines import token_due_s
from nexusengine.scheduler.load import worker_load
from nexusengine.scheduler.plan import Reason, SchedulerPolicy, StepPlan
from nexusengine.scheduler.stats import CoreStats, StepRecord
from nexusengine.scheduler.validate import plan_problem
from nexusengine.scheduler.view import EngineView, RequestColumns
from nexusengine.types import EngineRequest, FinishReason, Service, TokenDelta, TokenLogprob
from nexusengine.wire import Ask, Findings, WorkerLoad

_HITS_LOOKED_UP = 32
_BLOCKS_LOOKED_UP = 2048
_PUBLISH_EVERY_S = 0.02
_RECORDS = 4096
COLD_AFTER_S = 1.0  # without a step: clocks and caches of the device may have gone down


class EngineCore:
    """Serves requests on one executor.

    clock: gives arrival, deadlines and timings their meaning. hash_key: secret of the prefix cache's names.
    name: of this worker, for those who are told how they were served.
    check_every_step: verify every invariant after each step (tests).
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
        spec = executor.spec
        self.executor, self.policy, self.model, self.clock = executor, policy, model, clock
        self.max_running, self.max_waiting, self.name = max_running, max_waiting, name
        self.covers = 0
        self.records: deque[StepRecord] = deque(maxlen=_RECORDS)
        self.on_step: Callable[[StepRecord, StepBatch], None] | None = None  # e.g. obs.step_recorder; must not block
        self._hash_key, self._check_every_step = hash_key, check_every_step
        slots = max_running + max_waiting
        self.kv = KVManager(
            spec.num_blocks,
            spec.block_size,
            slots,
            -(-spec.max_model_len // spec.block_size),
            prefix_caching=prefix_caching,
        )
        self.max_model_len = min(spec.max_model_len, self.kv.total_blocks * spec.block_size)
        self._columns = RequestColumns.empty(slots)
        self._sampling = SamplingTable.empty(slots)
        self._last_token = np.zeros(slots, np.int32)
        self._strict = np.ones(slots, np.bool_)
        self._history = History(slots)
        self._free_slots = list(range(slots - 1, -1, -1))
        self._by_id: dict[str, RequestState] = {}
        self._by_slot: dict[int, RequestState] = {}
        self._running: dict[int, None] = {}
        self._ending: dict[int, None] = {}  # their last token is in flight; no policy sees them any more
        self._flights: deque[Flight] = deque()  # oldest first; two at most, and only while `step` runs
        self._waiting: OrderedDict[int, None] = OrderedDict()
        self._deadlines: list[tuple[float, str]] = []
        self._outbox: list[TokenDelta] = []  # survives a step that raises, so that no request ends unheard
        self._unforeseen: list[RequestState] = []  # by the policy, which is asked with the next plan
        self._arrivals = 0
        self._stats = CoreStats(kv_total_blocks=self.kv.total_blocks)
        self._finished_output_tokens = 0
        self._idle_since_s = self._stepped_s = clock.now()
        self._submitted = 0
        self._step_started_s: float | None = None
        self._published_s = float("-inf")
        self._published = WorkerLoad(covers=0, kv_total_blocks=self.kv.total_blocks)

    # ---- requests in and out -------------------------------------------------------------------------------------

    @property
    def has_work(self) -> bool:
        return bool(self._by_id or self._flights)

    @property
    def room(self) -> int:
        """How many requests `add` takes now."""
        return min(self.max_waiting - len(self._waiting), len(self._free_slots))

    def request_ids(self) -> list[str]:
        """Of all requests in it; safe from any thread."""
        return list(self._by_id)

    def add(self, request: EngineRequest) -> None:
        """Queue a request. Raises InvalidRequest, ContextTooLong (can never fit) or Overloaded (the queue is full)."""
        max_tokens = self.admissible(request)
        if self.room < 1:
            raise Overloaded(
                f"{len(self._waiting)} requests are waiting already", retry_after_s=self._predicted_drain_s()
            )
        slot = self._free_slots.pop()
        state = RequestState(
            request=request,
            slot=slot,
            tokens=np.array(request.prompt_token_ids, np.int32),
            known=len(request.prompt_token_ids),
            max_tokens=max_tokens,
            end_ids=frozenset(request.sampling.stop_token_ids)
            | frozenset(() if request.sampling.ignore_eos else request.eos_token_ids),
        )
        if self.kv.prefix_caching:
            state.hashes = block_hashes(state.tokens, self.kv.block_size, self._hash_key)
        self._sampling.set(slot, request.sampling)
        self._foresee(state)
        c = self._columns
        c.arrival_s[slot] = request.arrival_s
        c.prompt_tokens[slot] = c.known_tokens[slot] = state.known
        c.computed_tokens[slot] = c.generated_tokens[slot] = c.blocks[slot] = 0
        c.cached_tokens[slot] = c.cached_free_blocks[slot] = 0
        c.max_tokens[slot] = max_tokens
        c.ttft_s[slot] = request.slo.ttft_s if request.slo else np.nan
        c.tpot_s[slot] = request.slo.tpot_s if request.slo else np.nan
        c.first_token_s[slot] = c.last_token_s[slot] = np.nan
        c.priority[slot] = request.priority
        c.relegated[slot] = False
        self._strict[slot] = True
        state.serial = self._history.arrived(slot)
        self._last_token[slot] = state.tokens[-1]
        self._by_id[request.request_id] = self._by_slot[slot] = state
        self._waiting[slot] = None
        self._arrivals += 1
        self._stats.requests += 1
        self._stats.prompt_tokens += state.known
        if request.deadline_s is not None:
            self._watch_deadline(request.deadline_s, request.request_id)
        self._publish()

    def admissible(self, request: EngineRequest) -> int:
        """The number of output tokens at which the request ends. Raises InvalidRequest or ContextTooLong."""
        if request.request_id in self._by_id:
            raise InvalidRequest(f"a request with id {request.request_id!r} is being served", param="request_id")
        return longest_output(request, self.executor.spec.vocab_size, self.max_model_len)

    def _foresee(self, state: RequestState) -> None:
        """When its first token will come, and whether its promise can be kept; before it is one of those that wait."""
        now, slo = self.clock.now(), state.request.slo
        view = self._view(now)
        cached = self.kv.lookup(state.hashes, state.known - 1).tokens if self.kv.prefix_caching else 0
        waited_s = max(now - state.request.arrival_s, 0.0)
        state.predicted_ttft_s = waited_s + first_token_in_s(view, state.known - cached)
        state.unattainable = slo is not None and unattainable(view, state.known - cached, slo)
        self._unforeseen.append(state)

    def abort(self, request_id: str) -> TokenDelta | None:
        """End a request in whatever state it is; None if there is no such request."""
        state = self._by_id.get(request_id)
        if state is None:
            return None
        self._finish(state, "abort")
        return self._outbox.pop()

    def fail_all(self, code: str, message: str) -> list[TokenDelta]:
        """End every request with an error; what a step that raised had not delivered comes before."""
        for state in list(self._by_id.values()):
            self._fail(state, code, message)
        return self._take_outbox()

    # ---- one step ------------------------------------------------------------------------------------------------

    def step(self) -> list[TokenDelta]:
        """Compute one step and return the new tokens; returns at once when there is nothing to do. Where steps overlap,
        submits one and returns the tokens of the one before: none at first.

        Raises InternalError if the policy broke its contract; what the executor raises passes through.
        """
        now = self.clock.now()
        self._expire(now)
        submitted = self._submit_next(now)
        if not self._flights:
            self._idle_since_s = now
            self._publish(force=not self._by_id)
        elif not (submitted and self.executor.spec.overlaps and len(self._flights) == 1):
            self._land()
        return self._take_outbox()

    def _submit_next(self, now: float) -> bool:
        """Plan a step and hand it to the executor; False if there is nothing that it could compute yet."""
        began_s, preemptions = time.perf_counter(), self._stats.preemptions
        planned = self._plan(now) if self._running or self._waiting else None
        if planned is None:
            return False
        plan, batch = planned
        number = self._submitted + 1
        self._published = msgspec.structs.replace(self._published, step=number, step_upper_s=plan.upper_s)
        states = tuple(self._by_slot[slot] for slot in batch.slots.tolist())
        flight = Flight(
            number=number,
            plan=plan,
            batch=batch,
            features=StepFeatures.of(batch.counts, batch.starts),
            states=states,
            lives=tuple(state.preemptions for state in states),
            started_s=now,
            planning_s=time.perf_counter() - began_s,
            preempted=self._stats.preemptions - preemptions,
            cold=not self._flights and now - self._stepped_s > COLD_AFTER_S,
        )
        if not self._flights:
            self._step_started_s = now
        try:
            self.executor.submit(batch)
        except BaseException:
            self._step_started_s = None
            raise
        self._submitted = number
        self._history.planned(number, now, plan.reasons, batch.slots, batch.counts)
        self._flights.append(flight)
        self._advance(flight)
        return True

    def _land(self) -> None:
        """Wait for the oldest step in flight and do what it leads to."""
        try:
            result = self.executor.collect()
        except BaseException:
            self._flights.clear()
            self._step_started_s = None
            raise
        flight = self._flights.popleft()
        collected_s = time.perf_counter()
        self._step_started_s = self.clock.now() if self._flights else None
        self._apply(flight, result)
        plan, features = flight.plan, flight.features
        self._stats.steps += 1
        self._stats.computed_tokens += features.tokens
        self._stats.device_s += result.device_s
        self._stats.learn_prediction(plan.predicted_s, plan.upper_s, result.device_s)
        (self.model.observe_cold if flight.cold else self.model.observe)(features, result.device_s)
        self._idle_since_s = self._stepped_s = self.clock.now()
        self._publish(force=not self._by_id)
        if self._check_every_step:
            self.check()
        scheduler_s = flight.planning_s + time.perf_counter() - collected_s
        self._stats.scheduler_s += scheduler_s
        self.records.append(
            StepRecord(
                step=flight.number,
                started_s=flight.started_s,
                features=features,
                predicted_s=plan.predicted_s,
                upper_s=plan.upper_s,
                device_s=result.device_s,
                scheduler_s=scheduler_s,
                running=len(self._running) + len(self._ending),
                waiting=len(self._waiting),
                preempted=flight.preempted,
                reasons=tuple(np.bincount(plan.reasons, minlength=len(Reason)).tolist()),
                notes=plan.notes,
            )
        )
        if self.on_step is not None:
            self.on_step(self.records[-1], flight.batch)

    def _plan(self, now: float) -> tuple[StepPlan, StepBatch] | None:
        """A plan whose rows have their KV blocks; None if it refused all requests. Where no row finds blocks, because
        estimates of the prefix cache were stale, it is made anew with fresh ones, then with ever fewer running; or
        None while a step is in flight, which may free some."""
        attempt = 0
        while True:
            self._look_up_hits(everything=attempt > 0)
            plan = self._ask_policy(now)
            for slot in plan.preempt:
                self._preempt(slot)
            self._columns.relegated[list(plan.relegate)] = True
            self._columns.relegated[list(plan.restore)] = False
            for slot in plan.refuse:
                message = "refused: the engine cannot serve it in time"
                self._fail(self._by_slot[slot], Overloaded.code, message, self._predicted_drain_s())
            batch = self._place(plan, now)
            if len(batch.slots):
                return plan, batch
            if self._flights or not (self._running or self._waiting):
                return None
            if attempt and not self._running:
                raise InternalError(
                    f"policy {self.policy.name!r} plans nothing that can run, with {len(self._running)} requests "
                    f"running and {len(self._waiting)} waiting"
                )
            if attempt:
                self._preempt(next(reversed(self._running)))
            attempt += 1

    def _ask_policy(self, now: float) -> StepPlan:
        view = self._view(now)
        try:
            plan = self.policy.plan(view, now)
            problem = plan_problem(plan, view)
        except Exception as error:
            raise InternalError(f"policy {self.policy.name!r} failed: {error!r}") from error
        if problem is not None:
            raise InternalError(f"the plan of policy {self.policy.name!r} is invalid: {problem}")
        if self._unforeseen:
            if plan.first_token_s is not None:
                self._heed(plan.first_token_s)
            self._unforeseen.clear()
        return plan

    def _heed(self, first_token_s: F8) -> None:
        """The policy knows better when the first tokens of newcomers come, where it expects to keep their promise."""
        for state in self._unforeseen:
            instant_s = float(first_token_s[state.slot])
            if math.isfinite(instant_s) and self._by_slot.get(state.slot) is state:
                state.predicted_ttft_s = max(instant_s - state.request.arrival_s, 0.0)

    def _place(self, plan: StepPlan, now: float) -> StepBatch:
        """Find KV blocks for the planned rows and build the batch; a row without blocks is left for a later step."""
        c, size = self._columns, self.kv.block_size
        slots, counts = plan.slots.copy(), plan.counts.copy()
        keep = np.ones(len(slots), np.bool_)
        short = c.computed_tokens[slots] + counts > c.blocks[slots] * size
        for i in np.nonzero(short)[0].tolist():
            slot, count = int(slots[i]), int(counts[i])
            newcomer = slot in self._waiting
            if newcomer:
                state = self._by_slot[slot]
                cached = self.kv.admit(slot, state.hashes, state.known - 1)
                c.computed_tokens[slot] = cached
                counts[i] = count = min(count, int(c.known_tokens[slot]) - cached)
            if not self.kv.grow(slot, int(c.computed_tokens[slot]) + count):
                self._stats.plan_shortfalls += 1
                keep[i] = False
                if newcomer:
                    self.kv.release(slot)
                    c.computed_tokens[slot] = 0
                continue
            c.blocks[slot] = self.kv.blocks_of(slot)
            if newcomer:
                self._admitted(state, cached, now)
        slots, counts = slots[keep], counts[keep]
        order = np.argsort(counts > 1, kind="stable")
        return self._batch(slots[order], counts[order])

    def _batch(self, slots: I4, counts: I4) -> StepBatch:
        c = self._columns
        starts = c.computed_tokens[slots]
        ends = starts + counts
        sampled = ends == c.known_tokens[slots]
        offsets = np.cumsum(counts) - counts
        token_ids = np.empty(int(counts.sum()), np.int32)
        decodes = sampled & (counts == 1)
        token_ids[offsets[decodes]] = self._last_token[slots[decodes]]
        for i in np.nonzero(~decodes)[0].tolist():
            state = self._by_slot[int(slots[i])]
            tokens = state.tokens[starts[i] : min(ends[i], state.known)]
            token_ids[offsets[i] : offsets[i] + len(tokens)] = tokens
            token_ids[offsets[i] + len(tokens) : offsets[i] + counts[i]] = PENDING
        return StepBatch(slots, starts, counts, sampled, token_ids, self.kv.block_tables, self._sampling)

    def _advance(self, flight: Flight) -> None:
        """Move every row on by what the step computes; a sampled row has one more token, which nobody knows yet."""
        c, batch = self._columns, flight.batch
        c.computed_tokens[batch.slots] = batch.starts + batch.counts
        sampled = batch.slots[batch.sampled]
        expected_s = flight.started_s + flight.plan.predicted_s
        first = sampled[c.generated_tokens[sampled] == 0]
        c.first_token_s[first] = expected_s  # until it is there, so that a policy has something to go by
        c.last_token_s[sampled] = expected_s
        c.known_tokens[sampled] += 1
        c.generated_tokens[sampled] += 1
        self._last_token[sampled] = PENDING
        for slot in sampled[c.generated_tokens[sampled] == c.max_tokens[sampled]].tolist():
            del self._running[slot]
            self._ending[slot] = None
        for i in np.nonzero(batch.sampled)[0].tolist():
            flight.states[i].pending += 1

    def _apply(self, flight: Flight, result: StepResult) -> None:
        """Append what was sampled, name the blocks that are full, and end what is at its end."""
        batch, now = flight.batch, self.clock.now()
        c, size, by_slot, outbox = self._columns, self.kv.block_size, self._by_slot, self._outbox
        rows = np.nonzero(batch.sampled)[0]
        if len(rows) != len(result.token_ids):
            raise InternalError(f"{len(rows)} rows were to be sampled, the executor returned {len(result.token_ids)}")
        sampled = [flight.states[i] for i in rows.tolist()]
        for state, token in zip(sampled, result.token_ids.tolist(), strict=True):
            state.pending -= 1
            if token < 0 and by_slot.get(state.slot) is state:
                # Discarded: every later request with this beginning would meet the same numbers in the prefix cache.
                self._fail(state, InternalError.code, "the model's logits were not finite", discard=True)
        ends = batch.starts + batch.counts
        if self.kv.prefix_caching:
            for i in np.nonzero(batch.starts // size != ends // size)[0].tolist():
                state = flight.states[i]
                if by_slot.get(state.slot) is state and state.preemptions == flight.lives[i]:
                    self._commit(state, int(ends[i]))
        slots = batch.slots[rows]
        delivered = np.fromiter((state.output_tokens for state in sampled), np.int64, len(sampled))
        late = token_due_s(c.arrival_s[slots], c.ttft_s[slots], c.tpot_s[slots], delivered) < now
        generated = 0
        for row, (state, token) in enumerate(zip(sampled, result.token_ids.tolist(), strict=True)):
            slot = state.slot
            if token < 0 or by_slot.get(slot) is not state:  # failed above, or computed in vain
                continue
            generated += 1
            self._strict[slot] &= not late[row]
            state.output_tokens += 1
            if state.first_token_s is None:
                state.first_token_s = c.first_token_s[slot] = now
            if token in state.end_ids:
                stop_reason = token if token in state.request.sampling.stop_token_ids else None
                self._finish(state, "stop", stop_reason=stop_reason)
                continue
            logprobs = None if result.logprobs is None else _logprobs(result.logprobs, row, token, state)
            if state.output_tokens == state.max_tokens:
                self._finish(state, "length", (token,), logprobs)
                continue
            state.append(token)
            if not state.pending:
                self._last_token[slot] = token
                c.last_token_s[slot] = now
            if state.output_tokens > 1:
                outbox.append(TokenDelta(state.request.request_id, (token,), logprobs))
                continue
            timings, cached = state.timings(None), state.cached_tokens
            outbox.append(
                TokenDelta(
                    state.request.request_id,
                    (token,),
                    logprobs,
                    timings=timings,
                    cached_tokens=cached,
                    service=self._service(state),
                )
            )
        self._stats.generated_tokens += generated

    # ---- transitions ---------------------------------------------------------------------------------------------

    def _admitted(self, state: RequestState, cached: int, now: float) -> None:
        del self._waiting[state.slot]
        self._running[state.slot] = None
        if state.scheduled_s is None:
            state.scheduled_s = now
            state.cached_tokens = cached
        self._stats.cached_tokens += cached

    def _preempt(self, slot: int) -> None:
        """Take a running request's KV; it waits before all others and computes everything it knows anew."""
        del self._running[slot]
        self.kv.release(slot)
        self._columns.computed_tokens[slot] = self._columns.blocks[slot] = 0
        self._waiting[slot] = None
        self._waiting.move_to_end(slot, last=False)
        self._arrivals += 1
        self._by_slot[slot].preemptions += 1
        self._stats.preemptions += 1

    def _commit(self, state: RequestState, computed: int) -> None:
        size = self.kv.block_size
        have = len(state.hashes)
        if computed // size > have:
            tokens = state.tokens[have * size : computed]
            previous = state.hashes[-1] if have else b""
            state.hashes += block_hashes(tokens, size, self._hash_key, previous)
        self.kv.commit(state.slot, state.hashes, computed)

    def _finish(
        self,
        state: RequestState,
        reason: FinishReason,
        token_ids: tuple[int, ...] = (),
        logprobs: tuple[TokenLogprob, ...] | None = None,
        *,
        stop_reason: int | None = None,
        error: tuple[str, str, float | None] = ("", "", None),
        discard: bool = False,
    ) -> None:
        """End a request and put its last delta into the outbox. discard: what it computed may be wrong."""
        slot = state.slot
        for place in (self._running, self._waiting, self._ending):
            place.pop(slot, None)
        self.kv.release(slot, discard=discard)
        self._columns.blocks[slot] = self._columns.computed_tokens[slot] = 0
        del self._by_id[state.request.request_id], self._by_slot[slot]
        self._free_slots.append(slot)
        setattr(self._stats, f"finished_{reason}", getattr(self._stats, f"finished_{reason}") + 1)
        self._finished_output_tokens += state.output_tokens
        now, service = self.clock.now(), self._service(state)
        self._history.ended(slot, life_of(state, service, now, reason, error[1] or None))
        self._outbox.append(
            TokenDelta(
                state.request.request_id,
                token_ids,
                logprobs,
                finish_reason=reason,
                stop_reason=stop_reason,
                timings=state.timings(now),
                cached_tokens=state.cached_tokens,
                preemptions=state.preemptions,
                error_code=error[0] or None,
                error_message=error[1] or None,
                retry_after_s=error[2],
                service=service,
            )
        )

    def _service(self, state: RequestState) -> Service:
        return Service(self.name, state.predicted_ttft_s, state.unattainable, bool(self._strict[state.slot]))

    def _fail(
        self,
        state: RequestState,
        code: str,
        message: str,
        retry_after_s: float | None = None,
        *,
        discard: bool = False,
    ) -> None:
        self._finish(state, "error", error=(code, message, retry_after_s), discard=discard)

    def _take_outbox(self) -> list[TokenDelta]:
        deltas, self._outbox = self._outbox, []
        return deltas

    def _watch_deadline(self, deadline_s: float, request_id: str) -> None:
        if len(self._deadlines) > 2 * len(self._columns.known_tokens):  # most are of requests that have ended
            self._deadlines = [d for d in self._deadlines if d[1] in self._by_id]
            heapq.heapify(self._deadlines)
        heapq.heappush(self._deadlines, (deadline_s, request_id))

    def _expire(self, now: float) -> None:
        while self._deadlines and self._deadlines[0][0] <= now:
            deadline_s, request_id = heapq.heappop(self._deadlines)
            state = self._by_id.get(request_id)
            if state is not None and state.request.deadline_s == deadline_s:
                message = f"not finished within {deadline_s - state.request.arrival_s:.1f} s of its arrival"
                self._fail(state, DeadlineExceeded.code, message)

    # ---- what others see -----------------------------------------------------------------------------------------

    def _view(self, now: float) -> EngineView:
        return EngineView(
            columns=self._columns,
            running=np.fromiter(self._running, np.int32, len(self._running)),
            waiting=np.fromiter(self._waiting, np.int32, len(self._waiting)),
            free_blocks=self.kv.free_blocks,
            total_blocks=self.kv.total_blocks,
            block_size=self.kv.block_size,
            max_batch_tokens=self.executor.spec.max_batch_tokens,
            max_running=self.max_running,
            model=self.model,
            arrivals=self._arrivals,
            idle_s=0.0 if self._flights else now - self._idle_since_s,
        )

    def _look_up_hits(self, *, everything: bool) -> None:
        """Refresh what the prefix cache holds for those who wait longest; bounded unless `everything` is asked for."""
        if not self.kv.prefix_caching or len(self._running) >= self.max_running:
            return
        blocks = 0
        for n, slot in enumerate(self._waiting):
            if not everything and (n == _HITS_LOOKED_UP or blocks > _BLOCKS_LOOKED_UP):
                return
            state = self._by_slot[slot]
            hit = self.kv.lookup(state.hashes, state.known - 1)
            blocks += len(hit.blocks)
            self._columns.cached_tokens[slot] = hit.tokens
            self._columns.cached_free_blocks[slot] = hit.free_blocks

    def stats(self) -> CoreStats:
        """A picture of the counters and the present numbers."""
        return dataclasses.replace(
            self._stats,
            running=len(self._running) + len(self._ending),
            waiting=len(self._waiting),
            kv_used_blocks=self.kv.used_blocks,
            kv_evictions=self.kv.evictions,
        )

    def findings(self, ask: Ask) -> Findings:
        """The newest steps, and what is remembered of a request that is here or was not long ago."""
        life = None
        if ask.request_id is not None:
            state = self._by_id.get(ask.request_id)
            life = self._history.life(ask.request_id) if state is None else life_of(state, self._service(state))
        found = None
        if life is not None:
            found = request_history(life, self._history.changes(life.serial), self.records, self.clock.now())
        return Findings(ask.client, ask.query, self.name, step_histories(self.records, ask.last_steps), found)

    def load(self) -> WorkerLoad:
        """The newest published picture, at most about 20 ms older than the last step. Safe from any thread."""
        published, started_s = self._published, self._step_started_s
        running_s = 0.0 if started_s is None else max(self.clock.now() - started_s, 0.0)
        return msgspec.structs.replace(published, step_running_s=running_s)

    def _publish(self, force: bool = False) -> None:
        """Replace the published picture in one assignment, so that `load` never sees half of one."""
        now = self.clock.now()
        if not force and now - self._published_s < _PUBLISH_EVERY_S:
            return
        self._published_s = now
        view, stats = self._view(now), self.stats()
        self._published = worker_load(
            self._columns,
            view.running,
            view.waiting,
            covers=self.covers,
            stats=stats,
            perf=self.model.snapshot(),
            mean_output_tokens=self._finished_output_tokens / max(stats.requests - len(self._by_id), 1),
        )

    def _predicted_drain_s(self) -> float:
        """Seconds until the tokens waiting now are computed at the predicted rate; between 1 and 60."""
        c, waiting = self._columns, list(self._waiting)
        tokens = int((c.known_tokens[waiting] - c.computed_tokens[waiting]).sum()) + 1
        size = min(tokens, self.executor.spec.max_batch_tokens)
        step_s = self.model.predict(StepFeatures(size, 1, 1)).mean_s
        return float(np.clip(tokens / size * step_s, 1.0, 60.0))

    # ---- checks --------------------------------------------------------------------------------------------------

    def check(self) -> None:
        """Raises InternalError or KVError naming the first invariant that does not hold."""
        self.kv.check()
        c = self._columns
        if sorted([*self._running, *self._waiting, *self._ending]) != sorted(self._by_slot):
            raise InternalError("running, waiting and ending do not partition the requests")
        if len(self._running) > self.max_running:
            raise InternalError(f"{len(self._running)} sequences run, over the limit of {self.max_running}")
        if sorted([*self._by_slot, *self._free_slots]) != list(range(len(c.known_tokens))):
            raise InternalError("a slot is lost, or free and in use")
        for slot, state in self._by_slot.items():
            known, computed = int(c.known_tokens[slot]), int(c.computed_tokens[slot])
            generated, in_flight = (
                int(c.generated_tokens[slot]),
                sum(any(s is state for s in f.states) for f in self._flights),
            )
            if known != state.known + state.pending or known != state.prompt_tokens + generated:
                raise InternalError(
                    f"slot {slot}: {known} tokens in its column, {state.known} and {state.pending} pending in its state"
                )
            if state.output_tokens + state.pending != generated or known > self.max_model_len:
                raise InternalError(f"slot {slot}: {state.output_tokens} output tokens, {known} tokens in all")
            if not 0 <= state.pending <= in_flight or (slot in self._ending) != (generated == state.max_tokens):
                raise InternalError(f"slot {slot}: {state.pending} tokens pending, in {in_flight} steps in flight")
            if self._last_token[slot] != (PENDING if state.pending else state.tokens[known - 1]):
                raise InternalError(f"slot {slot}: its newest token is not the one the next step would compute")
            named = state.tokens[: len(state.hashes) * self.kv.block_size]
            if state.hashes != block_hashes(named, self.kv.block_size, self._hash_key):
                raise InternalError(f"slot {slot}: its block names are not those of its tokens")
            if not 0 <= computed < known or computed > int(c.blocks[slot]) * self.kv.block_size:
                raise InternalError(f"slot {slot}: {computed} of {known} tokens computed in {c.blocks[slot]} blocks")
            if int(c.blocks[slot]) != self.kv.blocks_of(slot) or (slot in self._waiting and c.blocks[slot]):
                raise InternalError(
                    f"slot {slot}: {c.blocks[slot]} blocks in its column, {self.kv.blocks_of(slot)} held"
                )


def _logprobs(sampled: SampledLogprobs, row: int, token: int, state: RequestState) -> tuple[TokenLogprob, ...] | None:
    wanted = state.request.sampling.logprobs
    if wanted is None:
        return None
    pairs: Iterable[tuple[int, float]] = zip(
        sampled.top_ids[row, :wanted].tolist(), sampled.top[row, :wanted].tolist(), strict=True
    )
    return (TokenLogprob(token, float(sampled.chosen[row]), tuple(pairs)),)
