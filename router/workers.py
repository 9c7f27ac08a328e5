"""The workers the router knows: what they reported, whether they make progress and accept requests. PURE."""

from __future__ import annotations

from dataclasses import dataclass, field

from nexusengine.router.breaker import Answer, Breaker
from nexusengine.router.ledger import NOTHING, Ledger, Share, Stage
from nexusengine.router.placement.policy import PlacementRequest, WorkerView
from nexusengine.wire import WorkerInfo, WorkerLoad, WorkerState, WorkerStatus, identity_of

STALL_FACTOR, STALL_AT_LEAST_S = 10.0, 5.0
SILENT_IS_STALLED_S, SILENT_IS_STALLED_PERIODS, SILENT_IS_GONE_S = 2.0, 10.0, 30.0
MIN_BACKPRESSURE_S, MAX_BACKPRESSURE_S = 0.1, 2.0
SLOW_START_S, SLOW_START_REQUESTS, SLOW_START_DOUBLES_S = 10.0, 4, 1.0
"""A worker that joins others at work has at most SLOW_START_REQUESTS in flight, twice as many every
SLOW_START_DOUBLES_S, and no such limit after SLOW_START_S: its model has seen few steps, and an empty queue attracts
everybody."""


@dataclass(slots=True)
class Worker:
    """One worker by its stable id. Only WorkerTable changes it.

    Attributes:
        identity: of the process (epoch) that serves for it now; None if there is none.
        last_identity: as identity, of the last process where there is none now.
        report_seq: number of the newest report; dispatch_seq: of the last dispatch.
        last_seen_s: timestamp of its last message; reported_s: of its last report; ready_s: when it became ready.
        full: it has said that it has too much to do; full_until_s: timestamp until which that is believed.
        slow_start_limit: most requests it may have in flight; infinite after its slow start.
        ejected: why its breaker lets no request through; None if it does.
        version: rises with every change that a view of it would show.
        expected_epoch: of the process that may register as this worker; "" for any.
    """

    info: WorkerInfo
    state: WorkerState = WorkerState.STARTING
    phase: str = "waiting to start"
    fraction: float = 0.0
    identity: bytes | None = None
    last_identity: bytes | None = None
    load: WorkerLoad | None = None
    reported_s: float = float("-inf")
    report_seq: int = -1
    dispatch_seq: int = 0
    last_seen_s: float = 0.0
    restarts: int = 0
    cause: str | None = None
    ready_s: float = float("-inf")
    full_until_s: float = float("-inf")
    full: bool = False
    slow_start_limit: float = float("inf")
    breaker: Breaker = field(default_factory=Breaker)
    ejected: str | None = None
    version: int = 0
    expected_epoch: str = ""


@dataclass(frozen=True, slots=True)
class _CachedView:
    """A view, and what it was made of."""

    view: WorkerView
    version: int
    share: Share
    share_version: int


class WorkerTable:
    """Workers by id, and by the identity of their process.

    Args:
        expected: the workers that may connect, each with the epoch of its process if it is known; where none are
            named, all may.
        report_period_s: how often they are expected to report.
    """

    def __init__(self, expected: list[WorkerInfo], report_period_s: float = 0.1) -> None:
        self._stalled_after_s = max(SILENT_IS_STALLED_S, SILENT_IS_STALLED_PERIODS * report_period_s)
        self.by_id = {info.worker_id: Worker(info, expected_epoch=info.epoch) for info in expected}
        self._open_to_all = not expected
        self._by_identity: dict[bytes, Worker] = {}
        self._views: dict[str, _CachedView] = {}

    def of(self, identity: bytes) -> Worker | None:
        """The worker that this process serves for; None if it is not known."""
        return self._by_identity.get(identity)

    def identities(self) -> list[bytes]:
        """The processes that serve now."""
        serving = (WorkerState.READY, WorkerState.STALLED)
        return [w.identity for w in self.by_id.values() if w.identity is not None and w.state in serving]

    # ---- life ----------------------------------------------------------------------------------------------------

    def may_connect(self, identity: bytes, info: WorkerInfo) -> bool:
        """Whether the process is the worker that it says it is."""
        if identity != identity_of(info.worker_id, info.epoch):
            return False
        worker = self.by_id.get(info.worker_id)
        if worker is None:
            return self._open_to_all
        return worker.expected_epoch in ("", info.epoch)

    def expect(self, worker_id: str, epoch: str) -> None:
        """Let only a process of this epoch register as the worker from now on."""
        if (worker := self.by_id.get(worker_id)) is not None:
            worker.expected_epoch = epoch

    def paused(self, seconds: float) -> None:
        """Excuse everybody's silence of so long."""
        for worker in self._by_identity.values():
            worker.last_seen_s += seconds

    def connect(self, identity: bytes, info: WorkerInfo, now: float) -> tuple[Worker, bytes | None]:
        """Register a process as this worker.

        Returns:
            The worker, and the process that it replaces if there was one.
        """
        worker = self.by_id.setdefault(info.worker_id, Worker(info))
        replaced = worker.identity if worker.identity not in (None, identity) else None
        if replaced is not None:
            self.disconnect(replaced, None)
        if worker.identity is None:
            worker.load, worker.reported_s, worker.report_seq = None, float("-inf"), -1
            if identity != worker.last_identity:  # else: the same process, which was thought gone
                worker.dispatch_seq = 0
            worker.breaker, worker.ejected = Breaker(), None
            worker.full_until_s, worker.full = float("-inf"), False
        worker.identity = worker.last_identity = identity
        worker.info, worker.last_seen_s = info, now
        worker.version += 1
        self._by_identity[identity] = worker
        return worker, replaced

    def starting(self, worker: Worker, phase: str, fraction: float) -> None:
        """The worker is loading its model."""
        worker.state, worker.phase, worker.fraction = WorkerState.STARTING, phase, fraction
        worker.version += 1

    def ready(self, worker: Worker, now: float, last_dispatch_seq: int = 0) -> None:
        """The worker accepts requests from now on; last_dispatch_seq is the last dispatch it has seen."""
        worker.dispatch_seq = max(worker.dispatch_seq, last_dispatch_seq)
        if worker.state is not WorkerState.READY:
            worker.ready_s = now
        worker.state = WorkerState.READY
        worker.phase, worker.fraction, worker.cause = "ready", 1.0, None
        worker.version += 1
        self._update_slow_start(now)

    def disconnect(self, identity: bytes, cause: str | None) -> Worker | None:
        """Note that the process is gone; its worker is without one until the next connects."""
        worker = self._by_identity.pop(identity, None)
        if worker is not None:
            worker.identity, worker.state, worker.load = None, WorkerState.GONE, None
            worker.phase, worker.cause = "gone", cause or worker.cause
            worker.version += 1
        return worker

    # ---- reports and answers -------------------------------------------------------------------------------------

    def report(self, identity: bytes, seq: int, load: WorkerLoad, ledger: Ledger, now: float) -> Worker | None:
        """Take a worker's report; None if the sender is unknown. Reports that are overtaken are dropped."""
        worker = self._by_identity.get(identity)
        if worker is None:
            return None
        worker.last_seen_s = now
        if seq > worker.report_seq:
            worker.report_seq, worker.load, worker.reported_s = seq, load, now
            worker.version += 1
            ledger.reported(identity, load.last_dispatch_seq)
        return worker

    def answered(
        self, identity: bytes | None, answer: Answer, retry_after_s: float | None, now: float, *, probe: bool
    ) -> None:
        """Note that a request ended at a worker process, or was cancelled there (Answer.IGNORED)."""
        worker = None if identity is None else self._by_identity.get(identity)
        if worker is None:
            return
        worker.breaker.answered(answer, now, probe=probe)
        self._update_ejected(worker)
        if answer is Answer.BACKPRESSURE:
            wait_s = min(max(retry_after_s or 0.0, MIN_BACKPRESSURE_S), MAX_BACKPRESSURE_S)
            worker.full_until_s, worker.full = now + wait_s, True
            worker.version += 1

    def dispatched(self, worker: Worker) -> tuple[int, bool]:
        """Number the next dispatch to a worker. Also whether it is the probe of its breaker."""
        worker.dispatch_seq += 1
        probe = worker.breaker.half_open
        if probe:
            worker.breaker.probing = True
            self._update_ejected(worker)
        return worker.dispatch_seq, probe

    def refresh(self, now: float) -> tuple[list[bytes], list[bytes]]:
        """Classify every worker's progress, and end what is over.

        Returns:
            The processes that have been silent for too long, and those that have just stalled.
        """
        silent, stalled = [], []
        for identity, worker in self._by_identity.items():
            silence_s = now - worker.last_seen_s
            if silence_s > SILENT_IS_GONE_S:
                silent.append(identity)
            worker.breaker.refresh(now)
            self._update_ejected(worker)
            if worker.full and now >= worker.full_until_s:
                worker.full = False
                worker.version += 1
            if worker.state not in (WorkerState.READY, WorkerState.STALLED):
                continue
            load = worker.load
            stuck = load is not None and load.step_running_s > max(STALL_FACTOR * load.step_upper_s, STALL_AT_LEAST_S)
            state = WorkerState.STALLED if stuck or silence_s > self._stalled_after_s else WorkerState.READY
            if state is not worker.state:
                worker.state = state
                worker.version += 1
                if state is WorkerState.STALLED:
                    stalled.append(identity)
        self._update_slow_start(now)
        return silent, stalled

    def _update_ejected(self, worker: Worker) -> None:
        ejected = worker.breaker.ejected()
        if ejected != worker.ejected:
            worker.ejected = ejected
            worker.version += 1

    def _update_slow_start(self, now: float) -> None:
        """Set how much each worker may have in slow start; where all are new, nobody is held back."""
        ready = [w for w in self._by_identity.values() if w.state is WorkerState.READY]
        any_settled = any(now - w.ready_s >= SLOW_START_S for w in ready)
        for worker in ready:
            age_s, limit = now - worker.ready_s, float("inf")
            if any_settled and age_s < SLOW_START_S:
                limit = SLOW_START_REQUESTS * 2.0 ** int(age_s / SLOW_START_DOUBLES_S)
            if limit != worker.slow_start_limit:
                worker.slow_start_limit = limit
                worker.version += 1

    def block_sizes(self) -> set[int]:
        """KV block sizes of all workers that have a process and reported theirs."""
        return {w.info.block_size for w in self._by_identity.values()} - {0}

    # ---- what others see -----------------------------------------------------------------------------------------

    def views(self, ledger: Ledger) -> list[WorkerView]:
        """One for each worker. A view is the same object as long as nothing in it has changed."""
        views = []
        for worker_id, worker in self.by_id.items():
            share = ledger.share(worker.identity)
            known = self._views.get(worker_id)
            if (
                known is None
                or known.version != worker.version
                or known.share is not share
                or known.share_version != share.version
            ):
                known = _CachedView(view_of(worker, share), worker.version, share, share.version)
                self._views[worker_id] = known
            views.append(known.view)
        return views

    def statuses(self, ledger: Ledger) -> tuple[WorkerStatus, ...]:
        """One for each worker, for the cluster's picture."""
        return tuple(
            WorkerStatus(
                info=w.info,
                state=w.state,
                phase=w.phase,
                fraction=w.fraction,
                outstanding=view.outstanding,
                load=w.load,
                restarts=w.restarts,
                cause=w.cause,
                ejected=view.ejected if view.state is WorkerState.READY else None,
            )
            for w, view in zip(self.by_id.values(), self.views(ledger), strict=True)
        )


def view_of(worker: Worker, share: Share = NOTHING) -> WorkerView:
    """A worker and its share of the ledger, as a policy sees them."""
    unreported: list[PlacementRequest] = []
    started: list[PlacementRequest] = []
    for entry in share.unreported.values():
        (started if entry.stage is Stage.STREAMING else unreported).append(entry.placement)
    ejected = worker.ejected
    waiting = (worker.load.waiting if worker.load is not None else 0) + len(unreported)
    if ejected is None and worker.full:
        ejected = "it has too much to do"
    if ejected is None and worker.info.max_waiting and waiting >= worker.info.max_waiting:
        ejected = f"{waiting} requests wait in it"
    return WorkerView(
        info=worker.info,
        state=worker.state,
        outstanding=len(share.entries),
        outstanding_tokens=share.tokens,
        prompt_tokens=share.prompt_tokens,
        waiting_tokens=share.waiting_tokens,
        waiting_pairs=share.waiting_pairs,
        load=worker.load,
        unreported=tuple(unreported),
        started=tuple(started),
        reported_s=worker.reported_s,
        ejected=ejected,
        slow_start=len(share.entries) >= worker.slow_start_limit,
    )
