"""The router under random deaths, aborts, silence and news: every request ends exactly once, and nothing is left."""

from __future__ import annotations

from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, rule

from nexusengine import wire
from nexusengine.router.baselines import LeastRequests
from nexusengine.router.core import RouterCore, identity_of
from nexusengine.types import EngineRequest, SamplingParams, TokenDelta

WORKERS, CLIENTS = ("w0", "w1", "w2"), (b"c0", b"c1")
workers = st.sampled_from(WORKERS)


class Cluster(RuleBasedStateMachine):
    """at: what each live worker process was told to do, as the worker sees it."""

    def __init__(self) -> None:
        super().__init__()
        self.core = RouterCore(
            LeastRequests(), [wire.WorkerInfo(w, "", 0, "cpu", "m") for w in WORKERS], epoch="r", max_held=3
        )
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
        info = wire.WorkerInfo(worker, str(self.epochs[worker]), 1, "cpu", "m", max_model_len=100)
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
        message = wire.WorkerDeltas(str(self.epochs[worker]), *wire.split_deltas(deltas))
        self.core.on_worker(identity, message, self.now)
        self.settle()

    @rule(seconds=st.floats(0.1, 3.0))
    def wait(self, seconds: float) -> None:
        self.now += seconds
        for client in CLIENTS:
            self.core.on_client(client, wire.Hello(), self.now)
        for worker in self.alive:
            report = wire.Report(str(self.epochs[worker]), int(self.now * 1000), wire.WorkerLoad(0))
            self.core.on_worker(self.identity(worker), report, self.now)
        self.core.on_timer(self.now)
        self.settle()

    @invariant()
    def the_ledger_is_what_is_open(self) -> None:
        ledger = self.core.ledger
        assert len(ledger) == len(self.open)
        assert all(name in ledger for name in self.open)
        at_workers = sum(w.outstanding for w in self.core.registry.views(ledger))
        assert ledger.held + at_workers == len(ledger)

    def teardown(self) -> None:
        for name in list(self.open):
            self.core.on_client(self.open[name], wire.Abort(name), self.now)
        self.settle()
        assert len(self.core.ledger) == 0
        assert self.open == {}
        assert not any(v.outstanding for v in self.core.registry.views(self.core.ledger))


TestCluster = Cluster.TestCase
TestCluster.settings = settings(max_examples=150, stateful_step_count=50, deadline=None)
