"""What the router does with every message, as a state machine without sockets: messages in, messages out.

Promises: every submitted request gets exactly one final delta; nothing follows it; a request whose worker died before
its client saw a token is dispatched once more, with its old deadline.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Literal

from nexusengine.errors import DeadlineExceeded, InternalError, InvalidRequest, Overloaded, Unavailable, WorkerLost
from nexusengine.kv.digest import short_names
from nexusengine.router.breaker import Answer, classify
from nexusengine.router.checks import (
    check_digest,
    check_info,
    check_load,
    problem_of_delta,
    problem_of_request,
    wrong_version,
)
from nexusengine.router.clients import Clients
from nexusengine.router.ledger import Entry, Ledger, Stage
from nexusengine.router.placement.policy import Hold, Place, PlacementPolicy, PlacementRequest, Refuse
from nexusengine.router.prefix import PrefixIndex
from nexusengine.router.trace import PlacementTrace
from nexusengine.router.workers import Registry
from nexusengine.types import EngineRequest, TokenDelta
from nexusengine.wire import (
    Abort,
    Cancel,
    Cluster,
    DebugQuery,
    DebugReply,
    Deltas,
    Dispatch,
    Hello,
    Leaving,
    Message,
    PrefixDigest,
    ProtocolError,
    Ready,
    Refused,
    RepeatPrefixes,
    Report,
    Reregister,
    Starting,
    Submit,
    ToRouterFromClient,
    ToRouterFromWorker,
    WorkerDeltas,
    WorkerInfo,
    identity_of,
    join_deltas,
    split_deltas,
)

MOST_ATTEMPTS = 2
DEADLINE_GRACE_S = 1.0
"""Workers end requests at their deadline themselves, with timings; the router steps in a little later."""
MOST_NAMES_A_BLOCK, FEWEST_BLOCKS = 4, 10_000
"""A worker that names more blocks than it has, by this factor, has lost count: its digest is begun anew."""
MOST_ASKED_AGAIN = 256
"""Held requests that the policy is asked about at a time."""

Side = Literal["client", "worker"]
BlockNames = Callable[[EngineRequest, int], Sequence[bytes]]
"""Names of the full KV blocks of a request's prompt, for a block size: those that workers give them."""


@dataclass(frozen=True, slots=True)
class Outgoing:
    """A message to send: to which side, to whom."""

    side: Side
    identity: bytes
    message: Message


class RouterCore:
    """All state of the router. Every method takes the instant `now`; what is to be sent is taken with `take`.

    expected: the workers that may register: each with the epoch of its process, "" for any; where none are named, all
    may. report_period_s: how often workers are expected to report. block_names: None where no prefix is to be looked
    up. on_client and on_worker raise ProtocolError for a message that makes no sense, which then has had no effect.
    """

    def __init__(
        self,
        policy: PlacementPolicy,
        expected: list[WorkerInfo],
        *,
        epoch: str,
        max_held: int = 4096,
        report_period_s: float = 0.1,
        block_names: BlockNames | None = None,
    ) -> None:
        self.policy, self.epoch, self.max_held = policy, epoch, max_held
        self.ledger = Ledger()
        self.registry = Registry(expected, report_period_s)
        self.prefixes = PrefixIndex()
        self.trace = PlacementTrace()
        self._block_names = block_names if policy.uses_prefixes else None
        self.draining = False
        self._clients = Clients()
        self._out: list[Outgoing] = []
        self._totals: dict[str, float] = defaultdict(float)
        self._finished_per_s = 0.0
        self._finished_since, self._counted_at_s = 0, 0.0

    def take(self) -> list[Outgoing]:
        """What is to be sent since the last call, in order."""
        out, self._out = self._out, []
        return out

    def cluster(self) -> Cluster:
        return Cluster(
            router_epoch=self.epoch,
            workers=self.registry.statuses(self.ledger),
            held=self.ledger.held,
            ledger=len(self.ledger),
            counters=dict(self._totals),
        )

    # ---- clients -------------------------------------------------------------------------------------------------

    def on_client(self, identity: bytes, message: ToRouterFromClient, now: float) -> None:
        """Raises ProtocolError. The first message of a client that is not known, or not known any more, begins a new
        session with it."""
        if isinstance(message, Hello) and (reason := wrong_version(message.protocol)):
            self._send("client", identity, Refused(reason))
            raise ProtocolError(reason)
        session, begins = self._clients.heard(identity, message, now)
        if session is None:
            return  # it has nothing here to abort; a question can wait for its next Hello
        if begins or isinstance(message, Hello):
            self._send("client", identity, session.of(self.cluster()))
        if isinstance(message, Submit):
            self._submit(identity, message.request, now)
        elif isinstance(message, DebugQuery):
            for worker in self.registry.identities():
                query = DebugQuery(message.query, message.last_steps, message.request_id, identity)
                self._send("worker", worker, query)
        elif isinstance(message, Abort):
            entry = self.ledger.get(message.request_id)
            if entry is not None and entry.client == identity:
                self._cancel(entry, now)
                self._finish(entry, TokenDelta(message.request_id, finish_reason="abort"))

    def on_client_gone(self, identity: bytes, now: float) -> None:
        """Nobody waits for its requests any more."""
        self._clients.forget(identity)
        for entry in self.ledger.of_client(identity):
            self._cancel(entry, now)
            self.ledger.remove(entry)
            self._totals["requests_abandoned"] += 1

    def _submit(self, client: bytes, request: EngineRequest, now: float) -> None:
        self._totals["requests"] += 1
        problem: tuple[str, str, float | None] | None = None
        if (nonsense := problem_of_request(request)) is not None:
            problem = (InvalidRequest.code, f"the request cannot be served: {nonsense}", None)
        elif request.request_id in self.ledger:
            problem = (InvalidRequest.code, f"a request with id {request.request_id!r} is being served", None)
        elif self.draining:
            problem = (Unavailable.code, "the server is shutting down", 5.0)
        elif self.ledger.held >= self.max_held:
            message = f"{self.ledger.held} requests are held already"
            problem = (Overloaded.code, message, self._predicted_drain_s())
        if problem is not None:
            code, message, retry_after_s = problem
            self._send_deltas({client: [_error(request.request_id, code, message, retry_after_s)]})
            return
        self._place(self.ledger.add(request, client), now)

    # ---- workers -------------------------------------------------------------------------------------------------

    def on_worker(self, identity: bytes, message: ToRouterFromWorker, now: float) -> None:
        """Raises ProtocolError."""
        if isinstance(message, Starting | Ready):
            self._on_hello(identity, message, now)
        elif isinstance(message, Report):
            check_load(message.load)
            if message.prefixes is not None:
                check_digest(message.prefixes.batches)
            if not self.registry.report(identity, message.seq, message.load, self.ledger, now):
                self._send("worker", identity, Reregister())
            elif message.prefixes is not None:
                self._follow(identity, message.prefixes, now)
        elif isinstance(message, WorkerDeltas):
            worker = self.registry.of(identity)
            if worker is not None:  # else: a process thought dead; its requests have been dealt with
                worker.last_seen_s = now
                self._forward(identity, message, now)
        elif isinstance(message, DebugReply):
            if message.client in self._clients:
                self._send("client", message.client, message)
        elif isinstance(message, Leaving):
            self.on_worker_gone(identity, message.cause, now)

    def on_worker_gone(self, identity: bytes, cause: str | None, now: float) -> None:
        """Its process ended or cannot be reached: unseen requests go elsewhere, seen ones end with an error."""
        worker = self.registry.disconnect(identity, cause)
        if worker is None:
            return
        self.prefixes.forget(worker.info.worker_id)
        self._totals["workers_lost"] += 1
        self._deal_with_orphans(identity, cause, now)
        self._push_cluster()

    def on_worker_exited(
        self, worker_id: str, epoch: str, cause: str, restarts: int, now: float, *, next_epoch: str = ""
    ) -> None:
        """The supervisor saw a worker process end. next_epoch: of the process that it starts in its place; "" if it
        is not known."""
        self.registry.expect(worker_id, next_epoch)
        self.on_worker_gone(identity_of(worker_id, epoch), cause, now)
        worker = self.registry.workers.get(worker_id)
        if worker is not None:
            worker.restarts, worker.cause = restarts, cause

    def _on_hello(self, identity: bytes, message: Starting | Ready, now: float) -> None:
        if reason := wrong_version(message.protocol):
            self._send("worker", identity, Refused(reason))
            raise ProtocolError(reason)
        check_info(message.info)
        if not self.registry.may_connect(identity, message.info):
            raise ProtocolError(f"worker {message.info.worker_id!r} was not started by this engine")
        worker, replaced = self.registry.connect(identity, message.info, now)
        if replaced is not None:
            self.prefixes.forget(message.info.worker_id)
            self._deal_with_orphans(replaced, "replaced by a newer process", now)
        before = worker.state
        if isinstance(message, Starting):
            self.registry.starting(worker, message.phase, message.fraction)
        else:
            self.registry.ready(worker, now, message.last_dispatch_seq)
            for request_id in message.in_flight:  # from before this router's time: their clients were told
                entry = self.ledger.get(request_id)
                if entry is None or entry.identity != identity:
                    self._send("worker", identity, Cancel(request_id))
            self._place_held(now)
        if worker.state is not before:
            self._push_cluster()

    def _follow(self, identity: bytes, digest: PrefixDigest, now: float) -> None:
        worker = self.registry.of(identity)
        if worker is None:
            return
        most = MOST_NAMES_A_BLOCK * max(worker.info.kv_total_blocks, FEWEST_BLOCKS)
        if not self.prefixes.follow(worker.info.worker_id, digest.round, digest.seq, digest.batches, now):
            self._totals["prefix_digests_lost"] += 1
            self._send("worker", identity, RepeatPrefixes())
        elif self.prefixes.count_of(worker.info.worker_id) > most:
            self.prefixes.forget(worker.info.worker_id)
            self._send("worker", identity, RepeatPrefixes())

    def drain_worker(self, worker_id: str) -> bool:
        """It gets no new requests and finishes what it has. False if there is no such worker."""
        known = self.registry.drain(worker_id)
        self._push_cluster()
        return known

    def _deal_with_orphans(self, identity: bytes, cause: str | None, now: float) -> None:
        for entry in self.ledger.at(identity):
            if entry.stage is Stage.DISPATCHED and entry.attempts < MOST_ATTEMPTS:
                self._redispatch(entry, now)
            else:
                when = "while its answer was streamed" if entry.stage is Stage.STREAMING else "twice"
                message = f"the worker was lost {when}" + (f": {cause}" if cause else "")
                self._finish(entry, _error(entry.request.request_id, WorkerLost.code, message))

    def _rescue(self, identity: bytes, now: float) -> None:
        """A worker makes no progress: what nobody has seen a token of is tried elsewhere, if there is an elsewhere."""
        if not any(view.takes for view in self.registry.views(self.ledger)):
            return
        for entry in self.ledger.at(identity):
            if entry.stage is Stage.DISPATCHED and entry.attempts < MOST_ATTEMPTS:
                self._cancel(entry, now)
                self._redispatch(entry, now)

    def _redispatch(self, entry: Entry, now: float) -> None:
        self._totals["redispatches"] += 1
        self.ledger.hold(entry)
        self._place(entry, now)

    def _forward(self, identity: bytes, message: WorkerDeltas, now: float) -> None:
        by_client: dict[bytes, list[TokenDelta]] = defaultdict(list)
        for delta in join_deltas(message.plain, message.full):
            entry = self.ledger.get(delta.request_id)
            if entry is not None and entry.identity == identity and entry.seq > message.last_dispatch_seq:
                continue  # of an attempt before the router thought the worker gone
            if entry is None or entry.identity != identity:
                if delta.finish_reason is None:  # aborted meanwhile, or served elsewhere
                    self._send("worker", identity, Cancel(delta.request_id))
                continue
            if (nonsense := problem_of_delta(delta)) is not None:
                self._send("worker", identity, Cancel(delta.request_id))
                delta = _error(delta.request_id, InternalError.code, f"the worker's answer makes no sense: {nonsense}")
            if delta.finish_reason is not None and self._answered(entry, delta, now):
                continue
            if entry.stage is not Stage.STREAMING:
                self._first_news(entry, delta, now)
            by_client[entry.client].append(delta)
            if delta.finish_reason is not None:
                self._count_end(delta)
                self.ledger.remove(entry)
        self._send_deltas(by_client)

    def _answered(self, entry: Entry, delta: TokenDelta, now: float) -> bool:
        """A worker ended a request. True if it was turned away before it began and is tried elsewhere instead."""
        answer = classify(delta.error_code if delta.finish_reason == "error" else None)
        self.registry.answered(entry.identity, answer, delta.retry_after_s, now, probe=entry.probe)
        entry.probe = False
        if answer in (Answer.BACKPRESSURE, Answer.FAULT):
            self._totals["backpressure" if answer is Answer.BACKPRESSURE else "faults"] += 1
        if answer is not Answer.BACKPRESSURE or entry.stage is Stage.STREAMING or entry.attempts >= MOST_ATTEMPTS:
            return False
        if not any(view.takes for view in self.registry.views(self.ledger)):
            return False
        self._redispatch(entry, now)
        return True

    def _first_news(self, entry: Entry, delta: TokenDelta, now: float) -> None:
        """The first token: how good were the predictions?"""
        self.ledger.streams(entry)
        if self._block_names is not None and entry.identity is not None and delta.token_ids:
            worker = self.registry.of(entry.identity)
            believed = entry.placement.cached_tokens.get(worker.info.worker_id, 0) if worker is not None else 0
            self._totals["prefix_prompt_tokens"] += entry.placement.prompt_tokens
            self._totals["prefix_predicted_tokens"] += believed
            self._totals["prefix_hit_tokens"] += delta.cached_tokens
            self._totals["prefix_error_tokens"] += abs(believed - delta.cached_tokens)
        if not delta.token_ids or entry.first_token_in_s is None:
            return
        self._totals["first_tokens_predicted"] += 1
        self._totals["first_token_s"] += now - entry.placed_s
        self._totals["first_token_error_s"] += abs(now - entry.placed_s - entry.first_token_in_s)

    def prepare(self, now: float) -> None:
        """Let the policy digest new reports; called when they have been taken in and before requests are."""
        self.policy.prepare(self.registry.views(self.ledger), now)

    # ---- time ----------------------------------------------------------------------------------------------------

    def paused(self, seconds: float) -> None:
        """The router itself did not run for so long, so that nobody's silence in this time says anything."""
        self._clients.paused(seconds)
        self.registry.paused(seconds)

    def on_timer(self, now: float) -> None:
        """Called every snapshot period: health, deadlines, held requests, silent clients, and the cluster's picture."""
        silent, stalled = self.registry.refresh(now)
        for identity in silent:
            self.on_worker_gone(identity, "silent for too long", now)
        for identity in stalled:
            self._rescue(identity, now)
        for entry in self.ledger.expired(now - DEADLINE_GRACE_S):
            self._cancel(entry, now)
            limit_s = entry.placement.deadline_s - entry.placement.arrival_s
            message = f"not finished within {limit_s:.1f} s of its arrival"
            self._finish(entry, _error(entry.request.request_id, DeadlineExceeded.code, message))
        for identity in self._clients.silent(now):
            self.on_client_gone(identity, now)
        if self.ledger.held:
            self._place_held(now)
        if now - self._counted_at_s >= 1.0:
            rate = self._finished_since / (now - self._counted_at_s)
            self._finished_per_s += 0.3 * (rate - self._finished_per_s)
            self._finished_since, self._counted_at_s = 0, now
        self._push_cluster()

    # ---- placement -----------------------------------------------------------------------------------------------

    def _place_held(self, now: float) -> None:
        for n, entry in enumerate(self.ledger.held_entries()):
            if n == MOST_ASKED_AGAIN:
                return
            held = self._place(entry, now)
            if held is not None and held.everyone:
                return

    def _place(self, entry: Entry, now: float) -> Hold | None:
        """Ask the policy and do what it says; returns its answer if that is to hold."""
        request = self._with_cached(entry)
        decision = self.policy.place(request, self.registry.views(self.ledger), now)
        self.trace.add(now, request, decision)
        if isinstance(decision, Hold):
            return decision
        if isinstance(decision, Refuse):
            delta = _error(entry.request.request_id, decision.code, decision.reason, decision.retry_after_s)
            self._finish(entry, delta)
            return None
        self._dispatch(entry, decision, now)
        return None

    def _with_cached(self, entry: Entry) -> PlacementRequest:
        """The request, with what the workers' prefix caches are now believed to hold of its prompt."""
        if self._block_names is None or not len(self.prefixes):
            return entry.placement
        cached: dict[str, int] = {}
        for size in self.registry.block_sizes():
            if size not in entry.prefix:
                entry.prefix[size] = short_names(self._block_names(entry.request, size), size)
            cached |= self.prefixes.shared(entry.prefix[size], size)
        if cached != entry.placement.cached_tokens:
            entry.placement = replace(entry.placement, cached_tokens=cached)
        return entry.placement

    def _dispatch(self, entry: Entry, decision: Place, now: float) -> None:
        worker = self.registry.workers[decision.worker_id]
        if worker.identity is None:
            raise ValueError(f"policy {self.policy.name!r} placed a request on {decision.worker_id}, which is gone")
        seq, entry.probe = self.registry.dispatched(worker)
        entry.placed_s, entry.first_token_in_s = now, decision.first_token_in_s
        self.ledger.dispatch(entry, worker.identity, seq)
        self._totals["dispatches"] += 1
        self._send("worker", worker.identity, Dispatch(seq, entry.request))

    def _predicted_drain_s(self) -> float:
        """Seconds until what is held is placed, at the present rate of finished requests; between 1 and 60."""
        if self._finished_per_s <= 0:
            return 5.0
        return min(max(self.ledger.held / self._finished_per_s, 1.0), 60.0)

    # ---- sending -------------------------------------------------------------------------------------------------

    def _send(self, side: Side, identity: bytes, message: Message) -> None:
        self._out.append(Outgoing(side, identity, message))

    def _send_deltas(self, by_client: dict[bytes, list[TokenDelta]]) -> None:
        for client, deltas in by_client.items():
            self._send("client", client, Deltas(*split_deltas(deltas)))

    def _push_cluster(self) -> None:
        cluster = self.cluster()
        for identity, session in self._clients.items():
            self._send("client", identity, session.of(cluster))

    def _cancel(self, entry: Entry, now: float) -> None:
        """Take the request from its worker, if it is at one."""
        if entry.identity is not None:
            self._send("worker", entry.identity, Cancel(entry.request.request_id))
            self.registry.answered(entry.identity, Answer.NOTHING, None, now, probe=entry.probe)
            entry.probe = False

    def _finish(self, entry: Entry, delta: TokenDelta) -> None:
        self._count_end(delta)
        self.ledger.remove(entry)
        self._send_deltas({entry.client: [delta]})

    def _count_end(self, delta: TokenDelta) -> None:
        self._totals[f"requests_{delta.finish_reason}"] += 1
        self._finished_since += 1


def _error(request_id: str, code: str, message: str, retry_after_s: float | None = None) -> TokenDelta:
    return TokenDelta(
        request_id, finish_reason="error", error_code=code, error_message=message, retry_after_s=retry_after_s
    )
