"""The router's state machine, message by message."""

from __future__ import annotations

from typing import Any

import msgspec
import pytest

from nexusengine import wire
from nexusengine.errors import ConfigError
from nexusengine.kv.digest import pack, short_hashes
from nexusengine.router.breaker import FAULTS_TO_OPEN
from nexusengine.router.core import RouterCore
from nexusengine.router.placement.prism import Prism
from nexusengine.router.placement.registry import make_policy
from nexusengine.router.workers import SLOW_START_REQUESTS
from nexusengine.types import SLO, EngineRequest, SamplingParams, Timings, TokenDelta
from nexusengine.wire import identity_of

CLIENT = b"client"


def info(worker: str, epoch: str = "e1", longest: int = 1000) -> wire.WorkerInfo:
    return wire.WorkerInfo(worker, epoch, 1, "cpu", "m", max_model_len=longest)


class Router:
    """A core with its outgoing messages sorted by receiver."""

    def __init__(self, *workers: str, policy: str = "least-requests", **options: Any) -> None:
        self.core = RouterCore(make_policy(policy), [info(w, "") for w in workers], epoch="r", **options)
        self.now = 0.0

    def ready(self, worker: str, epoch: str = "e1") -> None:
        self.core.on_worker(identity_of(worker, epoch), wire.Ready(info(worker, epoch)), self.now)

    def submit(self, name: str, prompt: int = 10, max_tokens: int = 5, deadline_s: float | None = None) -> None:
        sampling = SamplingParams(seed=1, max_tokens=max_tokens)
        request = EngineRequest(name, [1] * prompt, sampling, self.now, deadline_s=deadline_s)
        self.core.on_client(CLIENT, wire.Submit(request), self.now)

    def deltas(self, worker: str, *deltas: TokenDelta, epoch: str = "e1") -> None:
        message = wire.WorkerDeltas(*wire.split_deltas(deltas))
        self.core.on_worker(identity_of(worker, epoch), message, self.now)

    def sent(self) -> dict[bytes, list[wire.Message]]:
        out: dict[bytes, list[wire.Message]] = {}
        for o in self.core.take():
            if not isinstance(o.message, wire.Cluster):
                out.setdefault(o.identity, []).append(o.message)
        return out

    def dispatched(self) -> dict[str, str]:
        """Request id -> worker id of the dispatches since the last look."""
        return {
            m.request.request_id: identity.decode().split(".")[0]
            for identity, messages in self.sent().items()
            for m in messages
            if isinstance(m, wire.Dispatch)
        }

    def finals(self) -> dict[str, str]:
        """Request id -> finish reason or error code of the ends since the last look."""
        return {
            d.request_id: d.error_code or d.finish_reason or ""
            for m in self.sent().get(CLIENT, [])
            if isinstance(m, wire.Deltas)
            for d in wire.join_deltas(m.plain, m.full)
            if d.finish_reason
        }


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


def test_a_draining_worker_finishes_what_it_has_and_gets_nothing_new() -> None:
    router = Router("w0", "w1")
    router.ready("w0")
    router.submit("a")
    router.ready("w1")
    router.sent()
    assert router.core.drain_worker("w0")
    for name in "bc":
        router.submit(name)
    assert router.dispatched() == {"b": "w1", "c": "w1"}
    assert router.core.workers.by_id["w0"].state is wire.WorkerState.DRAINING
    router.deltas("w0", TokenDelta("a", (1,), finish_reason="stop"))
    assert router.finals() == {"a": "stop"}
    assert not router.core.drain_worker("w9")
    router.core.on_worker_exited("w0", "e1", "drained", 0, 0.0)
    router.ready("w0", "e2")
    router.submit("d")
    router.submit("e")
    assert "w0" in router.dispatched().values(), "a new process of it serves again"


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


def names(request: EngineRequest, block_size: int) -> list[bytes]:
    ids = request.prompt_token_ids
    return [bytes([ids[0]]) * 8 + i.to_bytes(8, "little") for i in range(len(ids) // block_size)]


def with_prefixes(policy: str, *workers: str) -> Router:
    router = Router()
    router.core = RouterCore(make_policy(policy), [], epoch="r", block_hashes=names)
    for w in workers:
        who = msgspec.structs.replace(info(w, longest=100_000), block_size=16)
        router.core.on_worker(identity_of(w, "e1"), wire.Ready(who), 0.0)
    return router


def tell_digest(router: Router, worker: str, seq: int, blocks: int, *, first: int = 1, digest_seq: int = 0) -> None:
    request = EngineRequest("", [first] * 16 * blocks, SamplingParams(), 0.0)
    packed = pack(short_hashes(names(request, 16), 16))
    digest = wire.PrefixDigest(0, digest_seq, ((packed, b""),))
    report = wire.Report(seq, wire.WorkerLoad(0), digest)
    router.core.on_worker(identity_of(worker, "e1"), report, router.now)


@pytest.mark.parametrize("policy", ["prism", "cache-aware", "lmetric"])
def test_requests_go_where_their_beginning_is_cached_and_hits_are_compared_with_what_was_believed(policy: str) -> None:
    router = with_prefixes(policy, "w0", "w1", "w2")
    tell_digest(router, "w1", 1, 100)
    for n in range(4):
        router.submit(f"a{n}", prompt=1610)
    assert set(router.dispatched().values()) == {"w1"}
    first = TokenDelta("a0", (5,), cached_tokens=1584, timings=Timings(0.0))
    router.deltas("w1", first)
    router.deltas("w1", TokenDelta("a0", (6,)))
    counters = router.core.cluster().counters
    assert (counters["prefix_prompt_tokens"], counters["prefix_predicted_tokens"]) == (1610, 1600)
    assert (counters["prefix_hit_tokens"], counters["prefix_error_tokens"]) == (1584, 16)
    router.core.on_worker_exited("w1", "e1", "killed", 1, 0.0)
    assert len(router.core.prefixes) == 0


def test_a_digest_with_a_gap_is_asked_for_anew_and_an_absurd_one_is_an_error() -> None:
    router = with_prefixes("prism", "w0")
    tell_digest(router, "w0", 1, 10)
    router.sent()
    tell_digest(router, "w0", 2, 10, digest_seq=5)
    assert router.sent() == {identity_of("w0", "e1"): [wire.RepeatPrefixes()]}
    for wrong in (b"123", b"x" * 8 * 5000):
        report = wire.Report(3, wire.WorkerLoad(0), wire.PrefixDigest(0, 1, ((wrong, b""),)))
        with pytest.raises(wire.ProtocolError, match="digest"):
            router.core.on_worker(identity_of("w0", "e1"), report, 0.0)


def test_prefixes_are_not_looked_up_for_a_policy_that_does_not_ask() -> None:
    router = with_prefixes("least-requests", "w0")
    tell_digest(router, "w0", 1, 10)
    router.submit("a", prompt=200)
    assert router.core.ledger.get("a").prefix == {}  # type: ignore[union-attr]


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


def test_what_a_worker_was_given_is_known_without_its_reports() -> None:
    router = with_prefixes("prism", "w0")
    tell_digest(router, "w0", 1, 20)

    def given() -> tuple[int, int, int, float]:
        view = router.core.workers.views(router.core.ledger)[0]
        return view.outstanding, view.prompt_tokens, view.waiting_tokens, view.waiting_pairs

    router.submit("a", prompt=330)
    router.submit("b", prompt=330)
    assert given() == (2, 660, 20, 2 * 10 * (330 - 5))
    router.deltas("w0", TokenDelta("a", (5,), cached_tokens=320, timings=Timings(0.0)))
    assert given() == (2, 660, 10, 10 * (330 - 5))
    router.deltas("w0", TokenDelta("a", (6,)), TokenDelta("b", finish_reason="length"))
    assert given() == (1, 330, 0, 0.0)
    router.deltas("w0", TokenDelta("a", finish_reason="length"))
    assert given() == (0, 0, 0, 0.0)


def test_on_a_saturated_cluster_who_waited_as_long_as_its_class_allows_is_refused_with_retry_after() -> None:
    router = Router("w0", policy="prism")
    router.ready("w0")
    promised = {"a": SLO(1.0, 0.1, patience=1.5), "b": SLO(1.0, 0.1), "c": SLO(1.0, 0.1, patience=1.5)}
    for name, slo in promised.items():
        request = EngineRequest(name, [1] * 10, SamplingParams(seed=1, max_tokens=5), 0.0, slo=slo)
        router.core.on_client(CLIENT, wire.Submit(request), 0.0)
    router.deltas("w0", TokenDelta("c", (5,), timings=Timings(0.0)))
    router.sent()
    policy = router.core._placer._policy
    assert isinstance(policy, Prism)
    policy._admission.refuses(router.core.ledger.get("a").placement, 0.0, 1.0)  # type: ignore[union-attr]
    for _ in range(60):
        policy.observe(False)
    router.core.on_timer(1.4)
    assert router.finals() == {}
    router.core.on_timer(1.6)
    sent = router.sent()
    assert [m for m in sent[identity_of("w0", "e1")] if isinstance(m, wire.Cancel)] == [wire.Cancel("a")]
    (deltas,) = sent[CLIENT]
    assert isinstance(deltas, wire.Deltas)
    (delta,) = deltas.full
    assert (delta.request_id, delta.error_code) == ("a", "overloaded")
    assert delta.retry_after_s is not None
    counters = router.core.cluster().counters
    assert (counters["refused_late"], counters["refused_at_once"]) == (1, 0)


def test_a_cluster_that_is_not_saturated_serves_late() -> None:
    router = Router("w0", policy="prism")
    router.ready("w0")
    slo = SLO(1.0, 0.1, patience=1.5)
    request = EngineRequest("a", [1] * 10, SamplingParams(seed=1, max_tokens=5), 0.0, slo=slo)
    router.core.on_client(CLIENT, wire.Submit(request), 0.0)
    router.core.on_timer(1.6)
    assert router.finals() == {}
