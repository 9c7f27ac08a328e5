"""What travels with a request and with its tokens comes out as it went in, and older shapes of it are understood."""

from __future__ import annotations

import msgspec

from nexusengine import wire
from nexusengine.types import SLO, SamplingParams, Service, Timings, TokenDelta
from tests.support.fakes import request

SAMPLING = SamplingParams(seed=1, max_tokens=3)


def test_a_promise_and_a_priority_reach_the_worker() -> None:
    sent = request("a", [1, 2], sampling=SAMPLING, slo=SLO(0.5, 0.05, 9.0), slo_class="gold", priority=-3)
    submitted = wire.decode_from_client(wire.encode(wire.Submit(sent)))
    assert isinstance(submitted, wire.Submit)
    dispatched = wire.decode_for_worker(wire.encode(wire.Dispatch(7, submitted.request)))
    assert dispatched == wire.Dispatch(7, sent)


def test_how_a_request_is_served_reaches_the_client() -> None:
    first = TokenDelta("a", (5,), timings=Timings(1.0, 2.0, 3.0), service=Service("w1", 0.7, unattainable=True))
    last = TokenDelta("a", (), finish_reason="length", service=Service("w1", None, strict=False))
    message = wire.WorkerDeltas(*wire.split_deltas([first, TokenDelta("a", (6,)), last]))
    received = wire.decode_from_worker(wire.encode(message))
    assert isinstance(received, wire.WorkerDeltas)
    assert wire.join_deltas(received.plain, received.full) == [TokenDelta("a", (6,)), first, last]


def test_a_delta_without_that_part_is_still_one_of_this_protocol() -> None:
    delta = {"request_id": "a", "token_ids": [1], "finish_reason": "stop"}
    frame = msgspec.msgpack.encode(["Deltas", [], [delta]])
    assert wire.decode_for_client(frame) == wire.Deltas((), (TokenDelta("a", (1,), finish_reason="stop"),))


STEP = wire.StepRecord(9, 1.0, 64, 3, 1, 2e3, 500, 0.01, 0.012, 0.011, 0.0003, 3, 7, 1, {"decode": 2}, {"limit_ms": 9})
RECORD = wire.RequestRecord(
    "a", 64, SLO(0.5, 0.05), "gold", 2, Timings(1.0, 1.1, 1.4, None, 5), Service("w1", 0.4), 16, 1
)
HISTORY = wire.RequestHistory(RECORD, 2.0, (wire.RequestChange(1.0, 9, "admitted", 32),), 4, (STEP,))


def test_a_question_goes_through_the_router_to_a_worker_and_its_answer_back() -> None:
    ask = wire.DebugQuery(3, 50, "a")
    assert wire.decode_from_client(wire.encode(ask)) == ask
    passed_on = wire.DebugQuery(3, 50, "a", b"client")
    assert wire.decode_for_worker(wire.encode(passed_on)) == passed_on
    answer = wire.DebugReply(b"client", 3, "w1", (STEP,), HISTORY)
    assert wire.decode_from_worker(wire.encode(answer)) == answer
    assert wire.decode_for_client(wire.encode(answer)) == answer


def test_the_largest_answer_is_far_below_the_limit_of_a_message() -> None:
    change = wire.RequestChange(1e9 / 3, 2**40, "wait_blocks_and_more", 2**30)
    history = msgspec.structs.replace(HISTORY, changes=(change,) * wire.MAX_CHANGES_IN_REPLY)
    steps = (msgspec.structs.replace(STEP, notes={f"note_{i}": 1 / 3 for i in range(30)}),) * wire.MAX_STEPS_IN_REPLY
    history = msgspec.structs.replace(history, steps=steps)
    assert len(wire.encode(wire.DebugReply(b"client", 3, "w1", steps, history))) < wire.MAX_MESSAGE_BYTES / 30
