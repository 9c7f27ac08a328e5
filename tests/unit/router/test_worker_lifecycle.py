"""The router's state machine, message by message: workers that start, stall, fail, leave and come back."""

from __future__ import annotations

import msgspec
import pytest

from nexusengine import wire
from nexusengine.router.breaker import FAULTS_TO_OPEN
from nexusengine.router.workers import SLOW_START_REQUESTS
from nexusengine.types import TokenDelta
from nexusengine.wire import identity_of
from tests.support.router_driver import CLIENT, Router, info


def test_news_of_a_worker_thought_dead_is_not_forwarded() -> None:
    router = Router("w0", "w1")
    router.ready("w0")
    router.submit("a")
    router.ready("w1")
    router.core.on_worker_exited("w0", "e1", "killed", 1, 0.0)
    router.sent()
    router.deltas("w0", TokenDelta("a", (7,)))
    assert CLIENT not in router.sent()
    router.deltas("w1", TokenDelta("a", (9,), finish_reason="stop"))
    assert router.finals() == {"a": "stop"}


def test_a_new_process_of_a_worker_replaces_the_old_one() -> None:
    router = Router("w0")
    router.ready("w0", "e1")
    router.submit("a")
    router.sent()
    router.ready("w0", "e2")
    assert [i.decode() for i, m in router.sent().items() if i != CLIENT] == ["w0.e2"]


def test_an_unknown_worker_is_asked_to_say_hello_and_its_old_requests_are_cancelled() -> None:
    router = Router("w0")
    identity = identity_of("w0", "e1")
    router.core.on_worker(identity, wire.Report(1, wire.WorkerLoad(0)), 0.0)
    assert router.sent() == {identity: [wire.Reregister()]}
    router.core.on_worker(identity, wire.Ready(info("w0"), ("old",)), 0.0)
    assert router.sent() == {identity: [wire.Cancel("old")]}


def test_silence_while_the_router_itself_did_not_run_is_nobodys_fault() -> None:
    router = Router("w0")
    router.ready("w0")
    router.submit("a")
    router.sent()
    router.core.paused(40.0)
    router.core.on_timer(41.0)
    assert router.sent() == {}
    assert router.core.workers.by_id["w0"].state is wire.WorkerState.READY
    assert len(router.core.ledger) == 1


def test_tokens_of_an_attempt_before_the_worker_was_thought_gone_are_not_taken_for_those_of_the_next() -> None:
    router = Router("w0")
    router.ready("w0")
    router.submit("a")
    router.now = 40.0
    router.core.on_client(CLIENT, wire.Hello(submitted=1), 40.0)
    router.core.on_timer(40.0)
    router.sent()
    identity = identity_of("w0", "e1")
    router.core.on_worker(identity, wire.Report(1, wire.WorkerLoad(1)), 40.0)
    assert router.sent() == {identity: [wire.Reregister()]}
    router.core.on_worker(identity, wire.Ready(info("w0"), ("a",), last_dispatch_seq=1), 40.0)
    sent = router.sent()[identity]
    assert [type(m) for m in sent] == [wire.Cancel, wire.Dispatch]
    assert isinstance(sent[1], wire.Dispatch)
    assert sent[1].seq == 2
    for last_dispatch_seq, tokens in ((1, (5, 6)), (2, (7,))):
        message = wire.WorkerDeltas((("a", tokens),), (), last_dispatch_seq)
        router.core.on_worker(identity, message, 40.0)
    assert router.sent() == {CLIENT: [wire.Deltas((("a", (7,)),))]}


def test_dispatches_after_a_restart_of_the_router_are_numbered_after_those_that_the_worker_has_seen() -> None:
    router = Router("w0")
    router.core.on_worker(identity_of("w0", "e1"), wire.Ready(info("w0"), last_dispatch_seq=57), 0.0)
    router.submit("a")
    (dispatch,) = router.sent()[identity_of("w0", "e1")]
    assert isinstance(dispatch, wire.Dispatch)
    assert dispatch.seq == 58
    router.core.on_worker_exited("w0", "e1", "killed", 1, 0.0)
    router.ready("w0", "e2")
    (dispatch,) = router.sent()[identity_of("w0", "e2")]
    assert isinstance(dispatch, wire.Dispatch)
    assert dispatch.seq == 1


def test_a_worker_registered_twice_keeps_what_it_was_given_since() -> None:
    router = Router("w0")
    router.ready("w0")
    router.submit("a")
    router.sent()
    identity = identity_of("w0", "e1")
    router.core.on_worker(identity, wire.Ready(info("w0"), ("a", "old")), 0.0)
    assert router.sent() == {identity: [wire.Cancel("old")]}


def test_a_worker_is_told_of_requests_that_are_not_its_own() -> None:
    router = Router("w0")
    router.ready("w0")
    router.deltas("w0", TokenDelta("gone", (7,)))
    assert router.sent() == {identity_of("w0", "e1"): [wire.Cancel("gone")]}
    router.deltas("w0", TokenDelta("gone", (7,), finish_reason="stop"))
    assert router.sent() == {}


@pytest.mark.parametrize("silent", [True, False])
def test_a_worker_without_progress_gets_no_new_requests_until_it_moves_again(silent: bool) -> None:
    router = Router("w0", "w1")
    router.ready("w0")
    stuck = wire.WorkerLoad(0, step_running_s=6.0, step_upper_s=0.1)
    router.now = 6.0
    if not silent:
        router.core.on_worker(identity_of("w0", "e1"), wire.Report(1, stuck), 6.0)
    router.core.on_timer(6.0)
    assert router.core.workers.by_id["w0"].state is wire.WorkerState.STALLED
    router.submit("a")
    assert router.dispatched() == {}
    router.core.on_worker(identity_of("w0", "e1"), wire.Report(2, wire.WorkerLoad(0)), 6.5)
    router.core.on_timer(6.6)
    assert router.dispatched() == {"a": "w0"}


def test_a_worker_that_is_silent_for_very_long_counts_as_gone() -> None:
    router = Router("w0")
    router.ready("w0")
    router.submit("a")
    router.core.on_client(CLIENT, wire.Hello(), 31.0)
    router.core.on_timer(31.0)
    assert router.core.workers.by_id["w0"].state is wire.WorkerState.GONE
    assert router.core.ledger.held == 1


def test_a_worker_that_turns_a_request_away_is_left_in_peace_and_another_gets_it() -> None:
    router = Router("w0", "w1")
    router.ready("w0")
    router.submit("a")
    assert router.dispatched() == {"a": "w0"}
    router.ready("w1")
    full = TokenDelta("a", finish_reason="error", error_code="overloaded", retry_after_s=1.0)
    router.deltas("w0", full)
    assert router.dispatched() == {"a": "w1"}
    router.submit("b")
    router.submit("c")
    assert set(router.dispatched().values()) == {"w1"}
    router.now = 1.1
    router.core.on_worker(identity_of("w0", "e1"), wire.Report(1, wire.WorkerLoad(1)), 1.1)
    router.core.on_timer(1.1)
    router.submit("d")
    assert router.dispatched() == {"d": "w0"}


def test_a_request_that_is_turned_away_everywhere_ends_with_that_answer() -> None:
    router = Router("w0", "w1")
    router.ready("w0")
    router.ready("w1")
    router.submit("a")
    (first,) = router.dispatched().values()
    full = TokenDelta("a", finish_reason="error", error_code="overloaded", retry_after_s=7.0)
    router.deltas(first, full)
    (second,) = router.dispatched().values()
    assert second != first
    router.deltas(second, full)
    assert router.finals() == {"a": "overloaded"}
    assert len(router.core.ledger) == 0


def test_a_worker_that_fails_request_after_request_gets_none_until_a_probe_succeeds() -> None:
    router = Router("w0", "w1")
    router.ready("w0")
    for n in range(FAULTS_TO_OPEN):
        router.submit(f"a{n}")
        router.deltas("w0", TokenDelta(f"a{n}", finish_reason="error", error_code="internal_error"))
    assert set(router.finals().values()) == {"internal_error"}
    router.submit("held")
    assert router.dispatched() == {}
    router.ready("w1")
    assert router.dispatched() == {"held": "w1"}
    for name in "bc":
        router.submit(name)
    assert set(router.dispatched().values()) == {"w1"}
    router.now = 1.5
    router.core.on_timer(1.5)
    for name in "def":
        router.submit(name)
    assert sorted(router.dispatched().values()) == ["w0", "w1", "w1"], "one probe, no more"
    router.core.on_client(CLIENT, wire.Abort("d"), 1.5)  # whichever it was, the next probe goes out
    router.core.on_client(CLIENT, wire.Abort("e"), 1.5)
    router.core.on_client(CLIENT, wire.Abort("f"), 1.5)
    router.submit("g")
    assert router.dispatched() == {"g": "w0"}
    router.deltas("w0", TokenDelta("g", finish_reason="stop"))
    for name in "hi":
        router.submit(name)
    assert set(router.dispatched().values()) == {"w0"}


def test_bad_requests_and_full_queues_never_open_a_breaker() -> None:
    router = Router("w0")
    router.ready("w0")
    for n in range(3 * FAULTS_TO_OPEN):
        router.submit(f"a{n}")
        code = "invalid_value" if n % 2 else "overloaded"
        router.deltas("w0", TokenDelta(f"a{n}", finish_reason="error", error_code=code))
        router.now += 0.2
        router.core.on_timer(router.now)
    router.sent()
    router.submit("b")
    assert router.dispatched() == {"b": "w0"}


def test_requests_nobody_has_seen_a_token_of_leave_a_worker_that_stalls() -> None:
    router = Router("w0", "w1")
    router.ready("w0")
    for name in "ab":
        router.submit(name)
    router.deltas("w0", TokenDelta("b", (7,)))
    router.ready("w1")
    router.sent()
    router.core.on_worker(identity_of("w1", "e1"), wire.Report(1, wire.WorkerLoad(0)), 2.0)
    router.core.on_timer(2.1)
    sent = router.sent()
    assert sent[identity_of("w0", "e1")] == [wire.Cancel("a")]
    assert [m.request.request_id for m in sent[identity_of("w1", "e1")]] == ["a"]  # type: ignore[attr-defined]
    router.now = 2.5
    router.deltas("w0", TokenDelta("a", (1,)), TokenDelta("b", (2,)))  # it wakes up: late news of a is ignored
    ids = [d[0] for m in router.sent()[CLIENT] for d in m.plain]  # type: ignore[attr-defined]
    assert ids == ["b"]


def test_a_worker_that_joins_others_at_work_gets_few_requests_at_first() -> None:
    router = Router("w0", "w1")
    router.ready("w0")
    for n in range(40):
        router.submit(f"a{n}")
    router.now = 20.0
    router.core.on_client(CLIENT, wire.Hello(), 20.0)
    router.core.on_worker(identity_of("w0", "e1"), wire.Report(1, wire.WorkerLoad(40)), 20.0)
    router.sent()
    router.ready("w1")
    for n in range(20):
        router.submit(f"b{n}")
    assert list(router.dispatched().values()).count("w1") == SLOW_START_REQUESTS
    router.now = 31.0
    for worker in ("w0", "w1"):
        router.core.on_worker(identity_of(worker, "e1"), wire.Report(2, wire.WorkerLoad(60)), 31.0)
    router.core.on_client(CLIENT, wire.Hello(), 31.0)
    router.core.on_timer(31.0)
    for n in range(20):
        router.submit(f"c{n}")
    assert set(router.dispatched().values()) == {"w1"}


def test_a_worker_whose_queue_is_full_is_passed_over_and_its_bound_holds() -> None:
    router = Router("w0", "w1")
    for worker, waiting in (("w0", 3), ("w1", 5)):
        who = msgspec.structs.replace(info(worker), max_waiting=waiting)
        router.core.on_worker(identity_of(worker, "e1"), wire.Ready(who), 0.0)
    for n in range(10):
        router.submit(str(n))
    placed = list(router.dispatched().values())
    assert (placed.count("w0"), placed.count("w1")) == (3, 5)
    assert router.core.ledger.held == 2
    router.deltas("w0", TokenDelta("0", (1,)))
    router.core.on_worker(identity_of("w0", "e1"), wire.Report(1, wire.WorkerLoad(3, waiting=2)), 0.1)
    router.core.on_timer(0.1)
    assert router.dispatched() == {"8": "w0"}


def test_a_new_process_of_a_worker_that_failed_starts_with_a_clean_slate() -> None:
    router = Router("w0")
    router.ready("w0")
    for n in range(FAULTS_TO_OPEN):
        router.submit(f"a{n}")
        router.deltas("w0", TokenDelta(f"a{n}", finish_reason="error", error_code="internal_error"))
    router.sent()
    router.submit("b")
    assert router.dispatched() == {}
    router.ready("w0", "e2")
    assert router.dispatched() == {"b": "w0"}
