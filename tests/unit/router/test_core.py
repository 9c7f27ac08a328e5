"""The router's state machine, message by message."""

from __future__ import annotations

import pytest

from nexusengine import wire
from nexusengine.errors import ConfigError
from nexusengine.router.placement.registry import make_policy
from nexusengine.types import SLO, EngineRequest, SamplingParams, TokenDelta
from nexusengine.wire import identity_of
from tests.support.router_driver import CLIENT, Router, info


def test_equal_workers_share_requests_in_rotation() -> None:
    router = Router("w0", "w1", "w2", "w3")
    for w in ("w0", "w1", "w2", "w3"):
        router.ready(w)
    for i in range(32):
        router.submit(str(i))
    placed = list(router.dispatched().values())
    assert {placed.count(w) for w in set(placed)} == {8}
    firsts = set()
    for i in range(4):  # one at a time: the ties must not all fall to the first worker
        router.core.on_client(CLIENT, wire.Submit(EngineRequest(f"x{i}", [1], SamplingParams(seed=1), 0.0)), 0.0)
        firsts |= set(router.dispatched().values())
        router.core.on_client(CLIENT, wire.Abort(f"x{i}"), 0.0)
    assert len(firsts) > 1


def test_a_request_waits_for_the_first_ready_worker() -> None:
    router = Router("w0")
    router.submit("a")
    assert router.sent() == {}
    assert router.core.ledger.held == 1
    router.ready("w0")
    assert router.dispatched() == {"a": "w0"}


def test_tokens_reach_the_client_and_the_end_empties_the_ledger() -> None:
    router = Router("w0")
    router.ready("w0")
    router.submit("a")
    router.sent()
    router.deltas("w0", TokenDelta("a", (7,)))
    router.deltas("w0", TokenDelta("a", (8,), finish_reason="length"))
    messages = router.sent()[CLIENT]
    assert [d.token_ids for m in messages for d in wire.join_deltas(m.plain, m.full)] == [(7,), (8,)]  # type: ignore[attr-defined]
    assert len(router.core.ledger) == 0


def test_a_request_nobody_has_seen_a_token_of_moves_to_another_worker_once() -> None:
    router = Router("w0", "w1")
    router.ready("w0")
    router.submit("a")
    assert router.dispatched() == {"a": "w0"}
    router.ready("w1")
    router.core.on_worker_exited("w0", "e1", "killed", 1, 0.0)
    assert router.dispatched() == {"a": "w1"}
    router.core.on_worker_exited("w1", "e1", "killed", 1, 0.0)
    assert router.finals() == {"a": "worker_lost"}
    assert len(router.core.ledger) == 0


def test_a_request_that_streams_ends_with_an_error_when_its_worker_dies() -> None:
    router = Router("w0", "w1")
    router.ready("w0")
    router.submit("a")
    router.deltas("w0", TokenDelta("a", (7,)))
    router.ready("w1")
    router.sent()
    router.core.on_worker_exited("w0", "e1", "killed", 1, 0.0)
    assert router.finals() == {"a": "worker_lost"}


def test_an_abort_ends_the_request_here_and_at_the_worker() -> None:
    router = Router("w0")
    router.ready("w0")
    router.submit("running")
    router.sent()
    router.core.on_client(CLIENT, wire.Abort("running"), 0.0)
    sent = router.sent()
    assert sent[identity_of("w0", "e1")] == [wire.Cancel("running")]
    assert len(router.core.ledger) == 0
    router.core.on_client(CLIENT, wire.Abort("running"), 0.0)
    assert router.sent() == {}


def test_a_client_that_falls_silent_takes_its_requests_with_it() -> None:
    router = Router("w0")
    router.ready("w0")
    router.submit("a")
    router.sent()
    router.core.on_worker(identity_of("w0", "e1"), wire.Report(1, wire.WorkerLoad(1)), 20.0)
    router.core.on_timer(20.0)
    assert router.sent() == {identity_of("w0", "e1"): [wire.Cancel("a")]}
    assert len(router.core.ledger) == 0


def test_a_client_that_was_forgotten_learns_what_is_lost_with_its_next_message() -> None:
    router = Router("w0")
    router.ready("w0")

    def sessions() -> list[tuple[int, int]]:
        clusters = [o.message for o in router.core.take() if isinstance(o.message, wire.Cluster)]
        return [(c.session, c.since) for c in clusters]

    router.core.on_client(CLIENT, wire.Hello(), 0.0)
    assert sessions() == [(1, 0)]
    router.submit("a")
    router.core.on_timer(20.0)
    router.core.take()
    router.now = 20.0
    request = EngineRequest("b", [1], SamplingParams(seed=1), 20.0)
    router.core.on_client(CLIENT, wire.Submit(request, 1), 20.0)
    out = router.core.take()
    assert [(o.message.session, o.message.since) for o in out if isinstance(o.message, wire.Cluster)] == [(2, 1)]
    assert "b" in router.core.ledger
    router.core.on_client(CLIENT, wire.Hello(submitted=2), 20.5)
    assert sessions() == [(2, 1)]
    router.core.on_client(b"another", wire.Hello(submitted=5), 20.5)
    assert sessions() == [(3, 5)]
    router.core.on_client(b"a third", wire.Abort("b"), 20.5)
    assert router.core.take() == []


def test_a_deadline_is_kept_for_held_requests_too() -> None:
    router = Router("w0")
    router.submit("a", deadline_s=3.0)
    router.core.on_timer(3.5)
    assert router.finals() == {}
    router.core.on_timer(4.1)
    assert router.finals() == {"a": "deadline_exceeded"}


def test_too_many_held_requests_and_duplicates_are_refused() -> None:
    router = Router("w0", max_held=2)
    for name in "aba":
        router.submit(name)
    assert router.finals() == {"a": "invalid_value"}
    router.submit("c")
    assert router.finals() == {"c": "overloaded"}
    assert len(router.core.ledger) == 2


def test_what_no_worker_can_hold_is_refused_and_what_one_can_goes_there() -> None:
    router = Router("w0", "w1")
    for worker, longest in (("w0", 100), ("w1", 50)):
        identity = identity_of(worker, "e1")
        router.core.on_worker(identity, wire.Ready(info(worker, longest=longest)), 0.0)
    router.submit("long", prompt=80)
    assert router.dispatched() == {"long": "w0"}
    router.submit("too long", prompt=120)
    assert router.finals() == {"too long": "context_length_exceeded"}


def test_reports_that_are_overtaken_are_dropped() -> None:
    router = Router("w0")
    router.ready("w0")
    identity = identity_of("w0", "e1")
    for seq, last_dispatch_seq in ((2, 9), (1, 5)):
        router.core.on_worker(identity, wire.Report(seq, wire.WorkerLoad(last_dispatch_seq)), 0.0)
    load = router.core.workers.by_id["w0"].load
    assert load is not None
    assert load.last_dispatch_seq == 9


def test_dispatches_the_worker_has_not_reported_yet_are_in_its_view() -> None:
    router = Router("w0")
    router.ready("w0")
    for name in "abc":
        router.submit(name)
    router.core.on_worker(identity_of("w0", "e1"), wire.Report(1, wire.WorkerLoad(last_dispatch_seq=2)), 0.0)
    (view,) = router.core.workers.views(router.core.ledger)
    assert (view.outstanding, [p.request_id for p in view.unreported]) == (3, ["c"])


def test_while_draining_new_requests_are_refused() -> None:
    router = Router("w0")
    router.ready("w0")
    router.core.draining = True
    router.submit("a")
    assert router.finals() == {"a": "unavailable"}


def test_an_unknown_policy_is_named_with_those_that_exist() -> None:
    with pytest.raises(ConfigError, match=r"'best'.*least-outstanding"):
        make_policy("best")


def test_held_requests_are_placed_by_when_they_are_due() -> None:
    router = Router("w0")
    for name, slo in (("none", None), ("late", SLO(9.0, 0.1)), ("soon", SLO(0.5, 0.1))):
        request = EngineRequest(name, [1], SamplingParams(seed=1), 0.0, slo=slo)
        router.core.on_client(CLIENT, wire.Submit(request), 0.0)
    router.ready("w0")
    assert list(router.dispatched()) == ["soon", "late", "none"]


def test_predicted_and_actual_first_tokens_are_counted() -> None:
    router = Router("w0", policy="prism")
    router.ready("w0")
    router.submit("a")
    router.now = 0.75
    router.deltas("w0", TokenDelta("a", (1,)))
    router.deltas("w0", TokenDelta("a", (2,)))
    counters = router.core.cluster().counters
    assert counters["first_tokens_predicted"] == 1
    assert counters["first_token_s"] == 0.75
    assert 0.0 < counters["first_token_error_s"] < 0.75


def test_a_question_goes_to_every_worker_that_serves_and_its_findings_back_to_who_asked() -> None:
    router = Router("w0", "w1", "w2")
    for w in ("w0", "w1"):  # w2 is not there yet
        router.ready(w)
    router.core.on_client(CLIENT, wire.Hello(), 0.0)
    router.sent()
    router.core.on_client(CLIENT, wire.DebugQuery(5, 9, "a", b"somebody else"), 0.0)
    asked = router.sent()
    assert asked == {identity_of(w, "e1"): [wire.DebugQuery(5, 9, "a", CLIENT)] for w in ("w0", "w1")}
    for client, passed_on in ((CLIENT, 1), (b"gone", 0)):
        findings = wire.DebugReply(client, 5, "w0")
        router.core.on_worker(identity_of("w0", "e1"), findings, 0.0)
        assert router.sent() == ({client: [findings]} if passed_on else {})
