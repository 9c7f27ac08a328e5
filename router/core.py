"""What the router does with every message, as a state machine without sockets: messages in, messages out.

Every submitted request gets exactly one final delta, and nothing follows it. A request whose worker died before its
client saw a token is dispatched once more, with its old deadline.
"""

from __future__ import annotations

from collections import defaultdict

from nexusengine.errors import InternalError, NexusError, Overloaded, WorkerLost, error_from_code
from nexusengine.router import checks
from nexusengine.router.breaker import Answer, classify
from nexusengine.router.clients import Clients
from nexusengine.router.ledger import Entry, Ledger, Stage
from nexusengine.router.outbox import Outbox, Outgoing
from nexusengine.router.placement.policy import Decision, Place, PlacementPolicy, Refuse
from nexusengine.router.placer import BlockHashes, Placer
from nexusengine.router.prefix import PrefixIndex
from nexusengine.router.refusals import past_deadline, refusal_on_arrival, waited_too_long
from nexusengine.router.stats import FinishRate, RouterStats
from nexusengine.router.streaming import goes_on
from nexusengine.router.workers import Worker, WorkerTable
from nexusengine.types import EngineRequest, TokenDelta
from nexusengine.wire import (
    Abort,
    Cancel,
    Cluster,
    DebugQuery,
    DebugReply,
    Dispatch,
    Hello,
    Leaving,
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
)

MAX_ATTEMPTS = 2
DEADLINE_GRACE_S = 1.0
"""Workers end requests at their deadline themselves, with timings; the router steps in a little later."""


class RouterCore:
    """All state of the router. Every method takes the timestamp `now`; what is to be sent is taken with `take`.

    Args:
        policy: decides where requests go.
        expected: the workers that may register, each with the epoch of its process, "" for any; where none are named,
            all may.
        epoch: of this router process.
        max_held: requests that may be held because no worker takes them; more are refused.
        report_period_s: how often workers are expected to report.
        block_hashes: None where no prefix is to be looked up.
    """

    def __init__(
        self,
        policy: PlacementPolicy,
        expected: list[WorkerInfo],
        *,
        epoch: str,
        max_held: int = 4096,
        report_period_s: float = 0.1,
        block_hashes: BlockHashes | None = None,
    ) -> None:
        self.epoch, self.max_held = epoch, max_held
        self.ledger = Ledger()
        self.workers = WorkerTable(expected, report_period_s)
        self.prefixes = PrefixIndex()
        self.stats = RouterStats()
        self.draining = False
        self._placer = Placer(policy, self.ledger, self.workers, self.prefixes, block_hashes)
        self._clients = Clients()
        self._outbox = Outbox()
        self._finish_rate = FinishRate()

    def take(self) -> list[Outgoing]:
        """What is to be sent since the last call, in order."""
        return self._outbox.take()

    def cluster(self) -> Cluster:
        """All workers and counters, as clients see them."""
        return Cluster(
            router_epoch=self.epoch,
            workers=self.workers.statuses(self.ledger),
            held=self.ledger.held,
            ledger=len(self.ledger),
            counters=self.stats.counters(),
        )

    # ---- clients -------------------------------------------------------------------------------------------------

    def on_client(self, identity: bytes, message: ToRouterFromClient, now: float) -> None:
        """Handle a client's message; the first of one that is not known, or not any more, begins a new session with it.

        Raises:
            ProtocolError: the message makes no sense, and has had no effect.
        """
        if isinstance(message, Hello) and (reason := checks.wrong_version(message.protocol)):
            self._outbox.to_client(identity, Refused(reason))
            raise ProtocolError(reason)
        session, begins = self._clients.heard(identity, message, now)
        if session is None:
            return  # it has nothing here to abort; a question can wait for its next Hello
        if begins or isinstance(message, Hello):
            self._outbox.to_client(identity, session.of(self.cluster()))
        if isinstance(message, Submit):
            self._submit(identity, message.request, now)
        elif isinstance(message, DebugQuery):
            for worker in self.workers.identities():
                query = DebugQuery(message.query, message.last_steps, message.request_id, identity)
                self._outbox.to_worker(worker, query)
        elif isinstance(message, Abort):
            entry = self.ledger.get(message.request_id)
            if entry is not None and entry.client == identity:
                self._cancel(entry, now)
                self._finish(entry, TokenDelta(message.request_id, finish_reason="abort"))

    def on_client_gone(self, identity: bytes, now: float) -> None:
        """Cancel the requests of a client that nobody waits for any more."""
        self._clients.forget(identity)
        for entry in self.ledger.of_client(identity):
            self._cancel(entry, now)
            self.ledger.remove(entry)
            self.stats.requests_abandoned += 1

    def _submit(self, client: bytes, request: EngineRequest, now: float) -> None:
        self.stats.requests += 1
        refusal = refusal_on_arrival(
            request, self.ledger, self._finish_rate, draining=self.draining, max_held=self.max_held
        )
        if refusal is not None:
            self._outbox.deltas({client: [TokenDelta.failed(request.request_id, refusal)]})
        else:
            entry = self.ledger.add(request, client)
            self._placer.arrived(entry)
            self._place(entry, now)

    # ---- workers -------------------------------------------------------------------------------------------------

    def on_worker(self, identity: bytes, message: ToRouterFromWorker, now: float) -> None:
        """Handle a worker's message.

        Raises:
            ProtocolError: the message makes no sense, and has had no effect.
        """
        if isinstance(message, Starting | Ready):
            self._register(identity, message, now)
        elif isinstance(message, Report):
            checks.check_load(message.load)
            if message.prefixes is not None:
                checks.check_digest(message.prefixes.batches)
            worker = self.workers.report(identity, message.seq, message.load, self.ledger, now)
            if worker is None:
                self._outbox.to_worker(identity, Reregister())
            elif message.prefixes is not None:
                self._follow_prefixes(worker.info, identity, message.prefixes, now)
        elif isinstance(message, WorkerDeltas):
            worker = self.workers.of(identity)
            if worker is not None:  # else: a process thought dead; its requests have been dealt with
                worker.last_seen_s = now
                self._forward(worker, identity, message, now)
        elif isinstance(message, DebugReply):
            if message.client in self._clients:
                self._outbox.to_client(message.client, message)
        elif isinstance(message, Leaving):
            self.on_worker_gone(identity, message.cause, now)

    def on_worker_gone(self, identity: bytes, cause: str | None, now: float) -> None:
        """A process ended or cannot be reached: requests nobody has seen a token of go elsewhere, others fail."""
        worker = self.workers.disconnect(identity, cause)
        if worker is None:
            return
        self.prefixes.forget(worker.info.worker_id)
        self.stats.workers_lost += 1
        self._recover(identity, cause, now)
        self._push_cluster()

    def on_worker_exited(
        self, worker_id: str, epoch: str, cause: str, restarts: int, now: float, *, next_epoch: str = ""
    ) -> None:
        """The supervisor saw a worker process end.

        Args:
            epoch: of that process.
            next_epoch: of the process that it starts in its place; "" if it is not known.
        """
        self.workers.expect(worker_id, next_epoch)
        self.on_worker_gone(identity_of(worker_id, epoch), cause, now)
        worker = self.workers.by_id.get(worker_id)
        if worker is not None:
            worker.restarts, worker.cause = restarts, cause

    def _register(self, identity: bytes, message: Starting | Ready, now: float) -> None:
        if reason := checks.wrong_version(message.protocol):
            self._outbox.to_worker(identity, Refused(reason))
            raise ProtocolError(reason)
        checks.check_info(message.info)
        if not self.workers.may_connect(identity, message.info):
            raise ProtocolError(f"worker {message.info.worker_id!r} was not started by this engine")
        worker, replaced = self.workers.connect(identity, message.info, now)
        if replaced is not None:
            self.prefixes.forget(message.info.worker_id)
            self._recover(replaced, "replaced by a newer process", now)
        before = worker.state
        if isinstance(message, Starting):
            self.workers.starting(worker, message.phase, message.fraction)
        else:
            self.workers.ready(worker, now, message.last_dispatch_seq)
            for request_id in message.in_flight:  # from before this router's time: their clients were told
                entry = self.ledger.get(request_id)
                if entry is None or entry.identity != identity:
                    self._outbox.to_worker(identity, Cancel(request_id))
            self._place_held(now)
        if worker.state is not before:
            self._push_cluster()

    def _follow_prefixes(self, info: WorkerInfo, identity: bytes, digest: PrefixDigest, now: float) -> None:
        if not self.prefixes.follow(info.worker_id, digest.round, digest.seq, digest.batches, now):
            self.stats.prefix_digests_lost += 1
            self._outbox.to_worker(identity, RepeatPrefixes())
        elif self.prefixes.has_too_many(info.worker_id, info.kv_total_blocks):
            self.prefixes.forget(info.worker_id)
            self._outbox.to_worker(identity, RepeatPrefixes())

    def _recover(self, identity: bytes, cause: str | None, now: float) -> None:
        """Place the requests of a lost process elsewhere, or fail them."""
        for entry in self.ledger.at(identity):
            if entry.stage is Stage.DISPATCHED and entry.attempts < MAX_ATTEMPTS:
                self._redispatch(entry, now)
            else:
                when = "while its answer was streamed" if entry.stage is Stage.STREAMING else "twice"
                self._fail(entry, WorkerLost(f"the worker was lost {when}" + (f": {cause}" if cause else "")))

    def _move_from_stalled(self, identity: bytes, now: float) -> None:
        """Move what nobody has seen a token of from a worker that makes no progress, if another accepts requests."""
        if not self._placer.any_accepts():
            return
        for entry in self.ledger.at(identity):
            if entry.stage is Stage.DISPATCHED and entry.attempts < MAX_ATTEMPTS:
                self._cancel(entry, now)
                self._redispatch(entry, now)

    def _redispatch(self, entry: Entry, now: float) -> None:
        self.stats.redispatches += 1
        self.ledger.hold(entry)
        self._place(entry, now)

    def _forward(self, worker: Worker, identity: bytes, message: WorkerDeltas, now: float) -> None:
        plain, others = goes_on(message, identity, self.ledger)
        by_client: dict[bytes, list[TokenDelta]] = defaultdict(list)
        for delta in [*others, *message.full]:
            entry = self.ledger.get(delta.request_id)
            if entry is not None and entry.identity == identity and entry.seq > message.last_dispatch_seq:
                continue  # of an attempt before the router thought the worker gone
            if entry is None or entry.identity != identity:
                if delta.finish_reason is None:  # aborted meanwhile, or served elsewhere
                    self._outbox.to_worker(identity, Cancel(delta.request_id))
                continue
            if (nonsense := checks.problem_of_delta(delta)) is not None:
                self._outbox.to_worker(identity, Cancel(delta.request_id))
                error = InternalError(f"the worker's reply makes no sense: {nonsense}")
                delta = TokenDelta.failed(delta.request_id, error)
            if delta.finish_reason is not None and self._answered(entry, delta, now):
                continue
            if entry.stage is not Stage.STREAMING:
                self._first_token(entry, worker, delta, now)
            by_client[entry.client].append(delta)
            if delta.finish_reason is not None:
                self._count_end(delta)
                self.ledger.remove(entry)
        self._outbox.deltas(by_client, plain)

    def _answered(self, entry: Entry, delta: TokenDelta, now: float) -> bool:
        """Note how a worker ended a request. True if it was turned away before it began and is tried elsewhere."""
        answer = classify(delta.error_code if delta.finish_reason == "error" else None)
        self.workers.answered(entry.identity, answer, delta.retry_after_s, now, probe=entry.probe)
        entry.probe = False
        self.stats.backpressure += answer is Answer.BACKPRESSURE
        self.stats.faults += answer is Answer.FAULT
        if answer is not Answer.BACKPRESSURE or entry.stage is Stage.STREAMING or entry.attempts >= MAX_ATTEMPTS:
            return False
        if not self._placer.any_accepts():
            return False
        self._redispatch(entry, now)
        return True

    def _first_token(self, entry: Entry, worker: Worker, delta: TokenDelta, now: float) -> None:
        self.ledger.streams(entry)
        in_time = now <= entry.placement.first_token_due_s
        self._placer.first_token(entry, bool(delta.token_ids) and in_time)
        if not delta.token_ids:
            return
        self.stats.errors.observe_first_token(entry, now)
        if self._placer.looks_up_prefixes:
            self.stats.errors.observe_prefix(entry, worker.info.worker_id, delta.cached_tokens)

    def prepare(self, now: float) -> None:
        """Let the policy digest new reports; called when they have been taken in and before requests are."""
        self._placer.prepare(now)

    # ---- time ----------------------------------------------------------------------------------------------------

    def paused(self, seconds: float) -> None:
        """Excuse everybody's silence while the router itself did not run."""
        self._clients.paused(seconds)
        self.workers.paused(seconds)

    def on_timer(self, now: float) -> None:
        """Check health, deadlines, held requests and silent clients, and push the cluster; every snapshot period."""
        silent, stalled = self.workers.refresh(now)
        for identity in silent:
            self.on_worker_gone(identity, "silent for too long", now)
        for identity in stalled:
            self._move_from_stalled(identity, now)
        for entry in self.ledger.expired(now - DEADLINE_GRACE_S):
            self._cancel(entry, now)
            self._fail(entry, past_deadline(entry))
        self._give_up_late(now)
        self._placer.look_at_tenants(now)
        for identity in self._clients.silent(now):
            self.on_client_gone(identity, now)
        if self.ledger.held:
            self._place_held(now)
        self._finish_rate.update(now)
        self._push_cluster()

    def _give_up_late(self, now: float) -> None:
        """Refuse those who wait beyond what their class allows, while waiting is of no use."""
        due, impatient = self.ledger.overdue(now)
        for entry in due:
            self._placer.first_token(entry, False)
        if not self._placer.saturated(now):
            return
        for entry in impatient:
            self.stats.refused_late += 1
            self._cancel(entry, now)
            self._fail(entry, waited_too_long(entry, self._finish_rate.drain_s(len(self.ledger)), now))

    # ---- placement -----------------------------------------------------------------------------------------------

    def _place_held(self, now: float) -> None:
        for entry, decision in self._placer.place_held(now):
            self._carry_out(entry, decision)

    def _place(self, entry: Entry, now: float) -> None:
        self._carry_out(entry, self._placer.place(entry, now))

    def _carry_out(self, entry: Entry, decision: Decision) -> None:
        if isinstance(decision, Refuse):
            self.stats.refused_at_once += decision.code == Overloaded.code
            self._fail(entry, error_from_code(decision.code, decision.reason, retry_after_s=decision.retry_after_s))
        elif isinstance(decision, Place) and entry.identity is not None:
            self.stats.dispatches += 1
            self.stats.placed_late += decision.late
            self._outbox.to_worker(entry.identity, Dispatch(entry.seq, entry.request))

    # ---- answers -------------------------------------------------------------------------------------------------

    def _push_cluster(self) -> None:
        cluster = self.cluster()
        for identity, session in self._clients.items():
            self._outbox.to_client(identity, session.of(cluster))

    def _cancel(self, entry: Entry, now: float) -> None:
        """Take the request from its worker, if it is at one."""
        if entry.identity is not None:
            self._outbox.to_worker(entry.identity, Cancel(entry.request.request_id))
            self.workers.answered(entry.identity, Answer.IGNORED, None, now, probe=entry.probe)
            entry.probe = False

    def _fail(self, entry: Entry, error: NexusError) -> None:
        self._finish(entry, TokenDelta.failed(entry.request.request_id, error))

    def _finish(self, entry: Entry, delta: TokenDelta) -> None:
        self._count_end(delta)
        self.ledger.remove(entry)
        self._outbox.deltas({entry.client: [delta]})

    def _count_end(self, delta: TokenDelta) -> None:
        if delta.finish_reason is not None:
            self.stats.count_end(delta.finish_reason)
            if delta.finish_reason != "error":
                self._finish_rate.add()
