"""The router under random deaths, aborts, faults, silence and reports that are lost, doubled or overtaken: every
request ends exactly once, nothing is left, and what is kept up to date step by step is what one would make anew."""

from __future__ import annotations

import numpy as np
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, rule

from nexusengine import wire
from nexusengine.router.core import RouterCore
from nexusengine.router.ledger import Entry, Stage
from nexusengine.router.placement.forecast_matrix import ForecastMatrix
from nexusengine.router.placement.registry import make_policy
from nexusengine.types import EngineRequest, SamplingParams, TokenDelta
from nexusengine.wire import identity_of

WORKERS, CLIENTS = ("w0", "w1"), (b"c0", b"c1")
workers = st.sampled_from(WORKERS)


class Cluster(RuleBasedStateMachine):
    """at: what each live worker process was told to do, as the worker sees it. seen: the last dispatch it saw; seq and
    accepted: of the reports it sent, and of the newest the router took."""

    policy = "least-requests"

    def __init__(self) -> None:
        super().__init__()
        infos = [wire.WorkerInfo(w, "", 0, "cpu", "m") for w in WORKERS]
        self.core = RouterCore(make_policy(self.policy), infos, epoch="r", max_held=3)
        self.seen: dict[bytes, int] = {}
        self.seq: dict[bytes, int] = {}
        self.covered: dict[bytes, int] = {}
        self.accepted: dict[bytes, wire.Report] = {}
        self.overtaken: dict[bytes, list[wire.Report]] = {}
        self.matrix = ForecastMatrix()
        self.now, self.names = 0.0, 0
        self.epochs = dict.fromkeys(WORKERS, 0)
        self.alive: set[str] = set()
        self.at: dict[bytes, dict[str, int]] = {}
        self.open: dict[str, bytes] = {}
        self.ended: set[str] = set()
        self.dispatches: dict[str, int] = {}

    def identity(self, worker: str) -> bytes:
        return identity_of(worker, str(self.epochs[worker]))

    def settle(self) -> None:
        """Deliver what the router sends."""
        for o in self.core.take():
            message = o.message
            if isinstance(message, wire.Dispatch):
                name = message.request.request_id
                assert name in self.open, "an ended request is dispatched"
                self.dispatches[name] = self.dispatches.get(name, 0) + 1
                assert self.dispatches[name] <= 2
                assert message.seq == self.seen.get(o.identity, 0) + 1, "dispatches are numbered without gaps"
                self.seen[o.identity] = message.seq
                self.at.setdefault(o.identity, {})[name] = 0
            elif isinstance(message, wire.Cancel):
                self.at.get(o.identity, {}).pop(message.request_id, None)
            elif isinstance(message, wire.Deltas):
                for delta in wire.join_deltas(message.plain, message.full):
                    assert delta.request_id not in self.ended, "news after the end"
                    assert self.open[delta.request_id] == o.identity, "news for somebody else"
                    if delta.finish_reason is not None:
                        self.ended.add(delta.request_id)
                        del self.open[delta.request_id]

    @rule(worker=workers)
    def start(self, worker: str) -> None:
        self.epochs[worker] += 1
        self.alive.add(worker)
        info = wire.WorkerInfo(worker, str(self.epochs[worker]), 1, "cpu", "m", max_model_len=100, max_waiting=6)
        self.core.on_worker(self.identity(worker), wire.Ready(info), self.now)
        self.settle()

    @rule(worker=workers)
    def die(self, worker: str) -> None:
        self.alive.discard(worker)
        self.at.pop(self.identity(worker), None)
        self.core.on_worker_exited(worker, str(self.epochs[worker]), "killed", 1, self.now)
        self.settle()

    @rule(client=st.sampled_from(CLIENTS), lifetime=st.one_of(st.none(), st.floats(0, 10)))
    def submit(self, client: bytes, lifetime: float | None) -> None:
        name, self.names = f"r{self.names}", self.names + 1
        self.open[name] = client
        deadline_s = None if lifetime is None else self.now + lifetime
        request = EngineRequest(name, [1, 2], SamplingParams(seed=1, max_tokens=3), self.now, deadline_s=deadline_s)
        self.core.on_client(client, wire.Submit(request), self.now)
        self.settle()

    @rule(data=st.data())
    def abort(self, data: st.DataObject) -> None:
        if self.open:
            name = data.draw(st.sampled_from(sorted(self.open)))
            self.core.on_client(self.open[name], wire.Abort(name), self.now)
            self.settle()
            assert name in self.ended

    @rule(worker=workers, ends=st.booleans())
    def work(self, worker: str, ends: bool) -> None:
        """Every request of the worker gets a token, and perhaps its end."""
        if worker not in self.alive:
            return
        identity = self.identity(worker)
        names = list(self.at.get(identity, {}))
        deltas = [TokenDelta(n, (1,), finish_reason="length" if ends else None) for n in names]
        if ends:
            self.at[identity] = {}
        message = wire.WorkerDeltas(*wire.split_deltas(deltas))
        self.core.on_worker(identity, message, self.now)
        self.settle()

    @rule(worker=workers, code=st.sampled_from(["overloaded", "internal_error", "invalid_value", "deadline_exceeded"]))
    def fail(self, worker: str, code: str) -> None:
        """The worker ends its oldest request with an error."""
        identity = self.identity(worker)
        if worker in self.alive and self.at.get(identity):
            name = next(iter(self.at[identity]))
            del self.at[identity][name]
            delta = TokenDelta(name, finish_reason="error", error_code=code)
            self.core.on_worker(identity, wire.WorkerDeltas((), (delta,)), self.now)
            self.settle()

    @rule(
        worker=workers,
        lag=st.integers(0, 3),
        waiting=st.integers(0, 6),
        running_s=st.sampled_from([0.0, 0.0, 0.0, 9.0]),
        fate=st.sampled_from(["comes", "comes", "comes twice", "is lost", "is overtaken"]),
    )
    def report(self, worker: str, lag: int, waiting: int, running_s: float, fate: str) -> None:
        if worker not in self.alive:
            return
        identity = self.identity(worker)
        self.seq[identity] = self.seq.get(identity, 0) + 1
        last_dispatch_seq = max(self.seen.get(identity, 0) - lag, self.covered.get(identity, 0))
        self.covered[identity] = last_dispatch_seq
        pending = (wire.PendingPrefill(self.now + 1.0, 100, 0, 0.05, False),) * waiting
        load = wire.WorkerLoad(last_dispatch_seq, waiting=waiting, pending=pending, step_running_s=running_s)
        report = wire.Report(self.seq[identity], load)
        if fate == "is overtaken":
            self.overtaken.setdefault(identity, []).append(report)
        if fate.startswith("comes"):
            self.accepted[identity] = report
            for one in [report] * (1 + (fate == "comes twice")) + self.overtaken.pop(identity, []):
                self.core.on_worker(identity, one, self.now)
        self.settle()

    @rule(seconds=st.floats(0.1, 3.0), heard=st.booleans())
    def wait(self, seconds: float, heard: bool) -> None:
        """Time passes; the workers were heard of or not."""
        self.now += seconds
        for client in CLIENTS:
            self.core.on_client(client, wire.Hello(), self.now)
        for worker in self.alive if heard else ():
            self.core.on_worker(self.identity(worker), wire.WorkerDeltas(()), self.now)
        self.core.on_timer(self.now)
        self.settle()

    @invariant()
    def views_are_what_one_would_make_anew(self) -> None:
        ledger, table = self.core.ledger, self.core.workers
        views = table.views(ledger)
        assert [v.worker_id for v in views] == list(table.by_id)
        for view in views:
            worker = table.by_id[view.worker_id]
            assert (view.info, view.state) == (worker.info, worker.state)
            entries = [e for e in self.all_entries() if worker.identity is not None and e.identity == worker.identity]
            entries.sort(key=lambda e: e.seq)
            assert view.outstanding == len(entries)
            assert view.outstanding_tokens == sum(e.tokens for e in entries)
            report = None if worker.identity is None else self.accepted.get(worker.identity)
            assert view.load == (None if report is None else report.load)
            last_dispatch_seq = 0 if report is None else report.load.last_dispatch_seq
            new = [e for e in entries if e.seq > last_dispatch_seq]
            assert view.unreported == tuple(e.placement for e in new if e.stage is Stage.DISPATCHED)
            assert view.started == tuple(e.placement for e in new if e.stage is Stage.STREAMING)
            assert view.slow_start == (len(entries) >= worker.slow_start_limit)
            if worker.breaker.ejected() is not None:
                assert view.ejected == worker.breaker.ejected()
            waiting = (view.load.waiting if view.load else 0) + len(view.unreported)
            assert (view.ejected is None) <= (not worker.info.max_waiting or waiting < worker.info.max_waiting)
        again = table.views(ledger)
        assert all(a is b for a, b in zip(views, again, strict=True)), "unchanged views are the same objects"
        fresh = ForecastMatrix()
        fresh.update(views, self.now)
        self.matrix.update(views, self.now)
        for name in ("keys", "ahead_s", "slack_s", "accepts", "slow_start", "max_tokens", "count"):
            assert np.array_equal(getattr(fresh, name), getattr(self.matrix, name)), name

    def all_entries(self) -> list[Entry]:
        return [e for name in self.open if (e := self.core.ledger.get(name)) is not None]

    @invariant()
    def the_ledger_is_what_is_open(self) -> None:
        ledger = self.core.ledger
        assert len(ledger) == len(self.open)
        assert all(name in ledger for name in self.open)
        at_workers = sum(w.outstanding for w in self.core.workers.views(ledger))
        assert ledger.held + at_workers == len(ledger)

    def teardown(self) -> None:
        for name in list(self.open):
            self.core.on_client(self.open[name], wire.Abort(name), self.now)
        self.settle()
        assert len(self.core.ledger) == 0
        assert self.open == {}
        for view in self.core.workers.views(self.core.ledger):
            assert (view.outstanding, view.outstanding_tokens, view.unreported, view.started) == (0, 0, (), ())


class PrismCluster(Cluster):
    policy = "prism"


TestCluster = Cluster.TestCase
TestPrismCluster = PrismCluster.TestCase
TestCluster.settings = TestPrismCluster.settings = settings(max_examples=60, stateful_step_count=50, deadline=None)
