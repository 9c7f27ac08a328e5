"""The workers the router knows: what they are, what they last said, and whether they make progress."""

from __future__ import annotations

from dataclasses import dataclass

from nexusengine.router.ledger import Ledger
from nexusengine.router.policy import WorkerView
from nexusengine.wire import WorkerInfo, WorkerLoad, WorkerState, WorkerStatus

STALL_FACTOR, STALL_AT_LEAST_S = 10.0, 5.0
SILENT_IS_STALLED_S, SILENT_IS_GONE_S = 5.0, 30.0


@dataclass(slots=True)
class Worker:
    """One worker by its stable id; `identity` is the process (epoch) that serves for it now, None if there is none."""

    info: WorkerInfo
    state: WorkerState = WorkerState.STARTING
    phase: str = "waiting to start"
    fraction: float = 0.0
    identity: bytes | None = None
    load: WorkerLoad | None = None
    report_seq: int = -1
    dispatch_seq: int = 0
    last_seen_s: float = 0.0
    restarts: int = 0
    cause: str | None = None


class Registry:
    """Workers by id, and by the identity of their process."""

    def __init__(self, expected: list[WorkerInfo]) -> None:
        self.workers = {info.worker_id: Worker(info) for info in expected}
        self._by_identity: dict[bytes, Worker] = {}

    def of(self, identity: bytes) -> Worker | None:
        return self._by_identity.get(identity)

    def identities(self) -> list[bytes]:
        """Of the processes that serve now."""
        serving = (WorkerState.READY, WorkerState.STALLED, WorkerState.DRAINING)
        return [w.identity for w in self.workers.values() if w.identity is not None and w.state in serving]

    def connect(self, identity: bytes, info: WorkerInfo, now: float) -> tuple[Worker, bytes | None]:
        """A process says that it is this worker. Returns the worker, and the process it replaces if there was one."""
        worker = self.workers.setdefault(info.worker_id, Worker(info))
        replaced = worker.identity if worker.identity not in (None, identity) else None
        if replaced is not None:
            self.disconnect(replaced, None)
        if worker.identity is None:
            worker.load, worker.report_seq, worker.dispatch_seq = None, -1, 0
        worker.identity, worker.info, worker.last_seen_s = identity, info, now
        self._by_identity[identity] = worker
        return worker, replaced

    def disconnect(self, identity: bytes, cause: str | None) -> Worker | None:
        """The process is gone; its worker is without one until the next connects."""
        worker = self._by_identity.pop(identity, None)
        if worker is not None:
            worker.identity, worker.state, worker.load = None, WorkerState.GONE, None
            worker.phase, worker.cause = "gone", cause or worker.cause
        return worker

    def report(self, identity: bytes, seq: int, load: WorkerLoad, now: float) -> bool:
        """Take a worker's report; False if the sender is unknown. Reports that are overtaken are dropped."""
        worker = self._by_identity.get(identity)
        if worker is None:
            return False
        worker.last_seen_s = now
        if seq > worker.report_seq:
            worker.report_seq, worker.load = seq, load
        return True

    def refresh(self, now: float) -> list[bytes]:
        """Judge every worker's progress. Returns the processes that have been silent for too long."""
        silent = []
        for identity, worker in self._by_identity.items():
            silence_s = now - worker.last_seen_s
            if silence_s > SILENT_IS_GONE_S:
                silent.append(identity)
            if worker.state not in (WorkerState.READY, WorkerState.STALLED):
                continue
            load = worker.load
            stuck = load is not None and load.step_running_s > max(STALL_FACTOR * load.step_upper_s, STALL_AT_LEAST_S)
            worker.state = WorkerState.STALLED if stuck or silence_s > SILENT_IS_STALLED_S else WorkerState.READY
        return silent

    def views(self, ledger: Ledger) -> list[WorkerView]:
        views = []
        for worker in self.workers.values():
            entries = ledger.at(worker.identity) if worker.identity is not None else []
            covers = worker.load.covers if worker.load is not None else 0
            views.append(
                WorkerView(
                    info=worker.info,
                    state=worker.state,
                    outstanding=len(entries),
                    outstanding_tokens=sum(e.tokens for e in entries),
                    load=worker.load,
                    unreported=tuple(e.placement for e in entries if e.seq > covers),
                )
            )
        return views

    def statuses(self, ledger: Ledger) -> tuple[WorkerStatus, ...]:
        return tuple(
            WorkerStatus(
                info=w.info,
                state=w.state,
                phase=w.phase,
                fraction=w.fraction,
                outstanding=len(ledger.at(w.identity)) if w.identity is not None else 0,
                load=w.load,
                restarts=w.restarts,
                cause=w.cause,
            )
            for w in self.workers.values()
        )
