"""The scheduler of one engine: who waits and who runs, which KV blocks they hold, and what the next step computes.

`core.EngineCore` runs it beside a real executor, `sim.SimEngine` beside a virtual clock; both see the same decisions.
PURE: time is an argument, and nothing here knows tokens, tensors or sockets.
"""

from __future__ import annotations

import dataclasses
from collections import OrderedDict
from dataclasses import dataclass
from typing import Generic, TypeVar

import numpy as np

from nexusengine.arrays import F8, I4, I8, Bools
from nexusengine.errors import InternalError
from nexusengine.kv.manager import KVManager
from nexusengine.perf.features import StepFeatures
from nexusengine.perf.model import PerformanceModel
from nexusengine.scheduler.fairness import TenantShares
from nexusengine.scheduler.load import worker_load
from nexusengine.scheduler.output_lengths import ExpectedLengths
from nexusengine.scheduler.plan import SchedulerPolicy, StepPlan
from nexusengine.scheduler.request import SchedulerRequest
from nexusengine.scheduler.stats import CoreStats
from nexusengine.scheduler.validate import plan_problem
from nexusengine.scheduler.view import EngineView, RequestColumns
from nexusengine.slo.due import tokens_due_s
from nexusengine.wire import WorkerLoad

COLD_AFTER_S = 1.0
"""Seconds without a step after which clocks and caches of a device may have gone down."""
_HITS_LOOKED_UP, _BLOCKS_LOOKED_UP = 32, 2048

R = TypeVar("R", bound=SchedulerRequest)


@dataclass(frozen=True, slots=True)
class Scheduled(Generic[R]):
    """What `Scheduler.schedule` decided.

    Attributes:
        plan: the policy's, as it was followed.
        slots, counts: `[R]`, the rows whose KV blocks were found, and how many tokens each computes. None: no step.
        refused: requests that the policy refused; the scheduler has let go of them.
    """

    plan: StepPlan
    slots: I4
    counts: I4
    refused: tuple[R, ...]


class Scheduler(Generic[R]):
    """Owns the columns that a policy sees, the queue, the running requests and the KV accounting.

    Args:
        policy: decides each step; anything that it raises, or a plan against its contract, is an InternalError.
        model: predicts step times, for the policy and for load reports.
        kv: block accounting for `max_running + max_waiting` slots.
        max_running, max_waiting: requests that hold KV, and that wait for it.
        max_batch_tokens: tokens that a step may compute.

    Attributes:
        running, waiting: slots in order of admission and of service; `ending`: slots whose last token is being
            computed, which no policy sees any more.
        requests: by slot.
        strict: bool `[S]`, whether each token so far came in time (see slo.due).
        stats: counters; those of steps are the owner's to keep.
    """

    def __init__(
        self,
        policy: SchedulerPolicy,
        model: PerformanceModel,
        kv: KVManager,
        *,
        max_running: int,
        max_waiting: int,
        max_batch_tokens: int,
    ) -> None:
        self.policy, self.model, self.kv = policy, model, kv
        self.max_running, self.max_waiting, self.max_batch_tokens = max_running, max_waiting, max_batch_tokens
        self.slots = slots = max_running + max_waiting
        self.columns = RequestColumns.empty(slots)
        self.strict = np.ones(slots, np.bool_)
        self.requests: dict[int, R] = {}
        self.running: dict[int, None] = {}
        self.waiting: OrderedDict[int, None] = OrderedDict()
        self.ending: dict[int, None] = {}
        self.stats = CoreStats(kv_total_blocks=kv.total_blocks)
        self._free_slots = list(range(slots - 1, -1, -1))
        self._tenants = TenantShares()
        self._over_share: Bools | None = None
        self._lengths = ExpectedLengths(self.columns)
        self._arrivals = 0
        self._finished_output_tokens = 0
        self._running_slots: I4 | None = None  # `running` and `waiting` as arrays, until they change
        self._waiting_slots: I4 | None = None

    # ---- requests in and out -------------------------------------------------------------------------------------

    @property
    def room(self) -> int:
        """How many requests `add` takes now."""
        return min(self.max_waiting - len(self.waiting), len(self._free_slots))

    @property
    def can_plan(self) -> bool:
        return bool(self.running or self.waiting)

    def add(self, request: R) -> None:
        """Queue a request, which gets its slot. There must be `room`."""
        slot, c, engine_request = self._free_slots.pop(), self.columns, request.request
        request.slot = slot
        c.enter(slot, engine_request, request.max_tokens)
        c.tenant[slot] = self._tenants.number_of(engine_request.tenant)
        self._lengths.arrived(request)
        self.strict[slot] = True
        self.requests[slot] = request
        self.waiting[slot] = None
        self._changed()
        self._arrivals += 1
        self.stats.requests += 1
        self.stats.prompt_tokens += request.prompt_tokens

    def finish(self, request: R, *, output_tokens: int, complete: bool = False, discard: bool = False) -> None:
        """Let go of a request in whatever state it is, unless that was done before.

        Args:
            output_tokens: how many it delivered.
            complete: its answer ended by itself or at its longest, so that its length tells of others.
            discard: what it computed may be wrong, and is not reused.
        """
        slot = request.slot
        if self.requests.get(slot) is not request:
            return
        for place in (self.running, self.waiting, self.ending):
            place.pop(slot, None)
        self._changed()
        self.kv.release(slot, discard=discard)
        self.columns.blocks[slot] = self.columns.computed_tokens[slot] = 0
        del self.requests[slot]
        self._free_slots.append(slot)
        self._finished_output_tokens += output_tokens
        self._lengths.ended(request, output_tokens if complete else None)
        if complete:
            self.stats.learn_length(request.expected_tokens, output_tokens)

    def preempt(self, slot: int) -> None:
        """Take a running request's KV; it waits before all others and computes everything it knows anew."""
        del self.running[slot]
        self.kv.release(slot)
        self.columns.computed_tokens[slot] = self.columns.blocks[slot] = 0
        self.waiting[slot] = None
        self.waiting.move_to_end(slot, last=False)
        self._changed()
        self._arrivals += 1
        self.requests[slot].preemptions += 1
        self.stats.preemptions += 1

    def _changed(self) -> None:
        self._running_slots = self._waiting_slots = None

    # ---- one step ------------------------------------------------------------------------------------------------

    def schedule(self, now: float, *, in_flight: bool = False) -> Scheduled[R]:
        """Plan the next step and find its KV blocks; call only while it `can_plan`.

        Where no row finds blocks, because estimates of the prefix cache were stale, the plan is made anew with fresh
        ones, then with ever fewer running.

        Args:
            now: timestamp, seconds.
            in_flight: a step is being computed, which may free blocks: then no row is an answer too.

        Raises:
            InternalError: the policy failed, broke its contract, or plans nothing that could ever run.
        """
        refused: list[R] = []
        attempt = 0
        while True:
            self._look_up_hits(everything=attempt > 0)
            plan = self._plan(now)
            self._follow(plan, refused)
            slots, counts = self._place(plan, now)
            if len(slots) or in_flight or not self.can_plan:
                return Scheduled(plan, slots, counts, tuple(refused))
            if attempt and not self.running:
                raise InternalError(
                    f"policy {self.policy.name!r} plans nothing that can run, with {len(self.running)} requests "
                    f"running, {len(self.waiting)} waiting and {self.kv.free_blocks} free blocks"
                )
            if attempt:
                self.preempt(next(reversed(self.running)))
            attempt += 1

    def _plan(self, now: float) -> StepPlan:
        if not self._tenants.one_tenant:
            self._over_share = self._tenants.over_share(self.columns.tenant, self.view().waiting, now)
        view = self.view()
        try:
            plan = self.policy.plan(view, now)
            problem = plan_problem(plan, view)
        except Exception as error:
            raise InternalError(f"policy {self.policy.name!r} failed: {error!r}") from error
        if problem is not None:
            raise InternalError(f"the plan of policy {self.policy.name!r} is invalid: {problem}")
        return plan

    def _follow(self, plan: StepPlan, refused: list[R]) -> None:
        """Do what the plan says of requests that do not compute."""
        for slot in plan.preempt:
            self.preempt(slot)
        for slot in plan.relegate:
            self.columns.relegated[slot] = self.requests[slot].ever_relegated = True
        if plan.restore:
            self.columns.relegated[list(plan.restore)] = False
        for slot in plan.refuse:
            refused.append(self.requests[slot])
            self.finish(refused[-1], output_tokens=int(self.columns.generated_tokens[slot]))

    def _place(self, plan: StepPlan, now: float) -> tuple[I4, I4]:
        """Find KV blocks for the planned rows; a row without blocks is left for a later step."""
        c, slots, counts = self.columns, plan.slots, plan.counts
        ends = c.computed_tokens[slots] + counts
        short = (ends > c.blocks[slots] * self.kv.block_size).nonzero()[0]
        if not len(short):
            return slots, counts
        counts, keep = counts.copy(), np.ones(len(slots), np.bool_)
        for i, slot, end in zip(short.tolist(), slots[short].tolist(), ends[short].tolist(), strict=True):
            if slot in self.waiting:
                counts[i] = self._admit(slot, int(counts[i]), now)
                keep[i] = counts[i] > 0
            elif not self.grow(slot, end):
                keep[i] = False
        if keep.all():
            return slots, counts
        self.stats.plan_shortfalls += len(slots) - int(np.count_nonzero(keep))
        return slots[keep], counts[keep]

    def _admit(self, slot: int, count: int, now: float) -> int:
        """Let a waiting request run that is to compute so many tokens; how many there are, 0 if blocks are lacking."""
        c, known = self.columns, int(self.columns.known_tokens[slot])
        cached = self.kv.admit(slot, self.requests[slot].block_hashes, known - 1)
        count = min(count, known - cached)
        if not self.kv.grow(slot, cached + count):
            self.kv.release(slot)
            return 0
        c.computed_tokens[slot], c.blocks[slot] = cached, self.kv.blocks_of(slot)
        self._admitted(self.requests[slot], cached, now)
        return count

    def _admitted(self, request: R, cached: int, now: float) -> None:
        del self.waiting[request.slot]
        self.running[request.slot] = None
        self._changed()
        if request.scheduled_s is None:
            request.scheduled_s, request.cached_tokens = now, cached
        self.stats.cached_tokens += cached

    def grow(self, slot: int, tokens: int) -> bool:
        """Let a running request hold blocks for so many tokens; False if there are not enough."""
        if not self.kv.grow(slot, tokens):
            return False
        self.columns.blocks[slot] = self.kv.blocks_of(slot)
        return True

    def advance(self, slots: I4, counts: I4, steps: int = 1) -> I4:
        """Move rows on by what they compute. Their KV is not in the prefix cache before `commit`.

        Args:
            slots, counts: `[R]`, rows and how many tokens each computes in one step.
            steps: how many equal decode steps; every row of them is sampled.

        Returns:
            The slots that are sampled, `[N]`: they know one more token a step.
        """
        c = self.columns
        c.computed_tokens[slots] = computed = c.computed_tokens[slots] + counts * steps
        ends = computed == c.known_tokens[slots]
        sampled = slots if steps > 1 or np.count_nonzero(ends) == len(ends) else slots[ends]
        c.known_tokens[sampled] += steps
        c.generated_tokens[sampled] += steps
        self._lengths.advanced(steps)
        if not self._tenants.one_tenant:
            self._tenants.served(c.tenant[slots], counts * steps, np.repeat(c.tenant[sampled], steps))
        return sampled

    def end_soon(self, slot: int) -> None:
        """The last token of a running request is being computed: no policy is asked about it any more."""
        del self.running[slot]
        self.ending[slot] = None
        self._changed()

    def commit(self, request: R, computed_tokens: int) -> None:
        """The KV of so many tokens is there: full blocks are found by others from now on, by `block_hashes`."""
        self.kv.commit(request.slot, request.block_hashes, computed_tokens)

    def judge(self, slots: I4, delivered: I4 | I8, at_s: F8, *, margin_s: float = 0.0) -> None:
        """Note in `strict` whose token comes late.

        Args:
            slots, delivered: `[N]`, who gets a token at each timestamp of at_s `[steps]`, and how many it had before.
            margin_s: how much earlier than it is due a token must come.
        """
        c = self.columns
        arrival_s, ttft_s, tpot_s = c.arrival_s[slots], c.ttft_s[slots], c.tpot_s[slots]
        if len(at_s) == 1:
            late = at_s[0] > arrival_s + ttft_s + delivered * tpot_s - margin_s  # never where there is no SLO: NaN
            self.strict[slots[late]] = False
            return
        due_s = tokens_due_s(arrival_s, ttft_s, tpot_s, delivered) - margin_s
        late_s = at_s[None, :] - due_s[:, None] - np.arange(len(at_s)) * tpot_s[:, None]
        self.strict[slots] &= ~(late_s > 0.0).any(axis=1)

    # ---- what others see -----------------------------------------------------------------------------------------

    def view(self) -> EngineView:
        if self._running_slots is None:
            self._running_slots = np.fromiter(self.running, np.int32, len(self.running))
        if self._waiting_slots is None:
            self._waiting_slots = np.fromiter(self.waiting, np.int32, len(self.waiting))
        return EngineView(
            columns=self.columns,
            running=self._running_slots,
            waiting=self._waiting_slots,
            free_blocks=self.kv.free_blocks,
            total_blocks=self.kv.total_blocks,
            block_size=self.kv.block_size,
            max_batch_tokens=self.max_batch_tokens,
            max_running=self.max_running,
            model=self.model,
            arrivals=self._arrivals,
            over_share=self._over_share,
        )

    def _look_up_hits(self, *, everything: bool) -> None:
        """Refresh what the prefix cache holds for those who wait longest; bounded unless `everything` is asked for."""
        if not self.kv.prefix_caching or len(self.running) >= self.max_running:
            return
        blocks = 0
        for n, slot in enumerate(self.waiting):
            if not everything and (n == _HITS_LOOKED_UP or blocks > _BLOCKS_LOOKED_UP):
                return
            hit = self.kv.lookup(self.requests[slot].block_hashes, int(self.columns.known_tokens[slot]) - 1)
            blocks += len(hit.blocks)
            self.columns.cached_tokens[slot] = hit.tokens
            self.columns.cached_free_blocks[slot] = hit.free_blocks

    def counters(self) -> CoreStats:
        """A copy of the counters with the present numbers."""
        return dataclasses.replace(self._stats_now())

    def _stats_now(self) -> CoreStats:
        stats, kv = self.stats, self.kv
        stats.running, stats.waiting = len(self.running) + len(self.ending), len(self.waiting)
        stats.kv_used_blocks, stats.kv_evictions = kv.used_blocks, kv.evictions
        return stats

    def load(self, last_dispatch_seq: int) -> WorkerLoad:
        """What the router is told. last_dispatch_seq: number of the newest dispatch that is in it."""
        view, stats = self.view(), self._stats_now()
        return worker_load(
            self.columns,
            view.running,
            view.waiting,
            last_dispatch_seq=last_dispatch_seq,
            stats=stats,
            perf=self.model.snapshot(),
            mean_output_tokens=self._finished_output_tokens / max(stats.requests - len(self.requests), 1),
        )

    def predicted_drain_s(self) -> float:
        """Seconds until the tokens that wait now are computed at the predicted rate; between 1 and 60."""
        c, waiting = self.columns, self.view().waiting
        tokens = int((c.known_tokens[waiting] - c.computed_tokens[waiting]).sum()) + 1
        size = min(tokens, self.max_batch_tokens)
        step_s = self.model.predict(StepFeatures(size, 1, 1)).mean_s
        return float(np.clip(tokens / size * step_s, 1.0, 60.0))

    def check(self) -> None:
        """Raises InternalError or KVError naming the first invariant that does not hold."""
        self.kv.check()
        c = self.columns
        if sorted([*self.running, *self.waiting, *self.ending]) != sorted(self.requests):
            raise InternalError("running, waiting and ending do not partition the requests")
        if len(self.running) > self.max_running:
            raise InternalError(f"{len(self.running)} sequences run, over the limit of {self.max_running}")
        if sorted([*self.requests, *self._free_slots]) != list(range(self.slots)):
            raise InternalError("a slot is lost, or free and in use")
        for slot in self.requests:
            known, computed, blocks = int(c.known_tokens[slot]), int(c.computed_tokens[slot]), int(c.blocks[slot])
            if known != c.prompt_tokens[slot] + c.generated_tokens[slot]:
                raise InternalError(f"slot {slot}: {known} tokens are not its prompt and its output")
            if not 0 <= computed < known or computed > blocks * self.kv.block_size:
                raise InternalError(f"slot {slot}: {computed} of {known} tokens computed in {blocks} blocks")
            if blocks != self.kv.blocks_of(slot) or (slot in self.waiting and blocks):
                raise InternalError(f"slot {slot}: {blocks} blocks in its column, {self.kv.blocks_of(slot)} held")
