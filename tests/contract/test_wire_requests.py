"""What travels with a request and with its tokens comes out as it went in, and older shapes of it are understood."""

from __future__ import annotations

import msgspec

from nexusengine import wire
from nexusengine.types import SLO, SamplingParams, Service, Timings, TokenDelta
from tests.fakes import request

SAMPLING = SamplingParams(seed=1, max_tokens=3)


def test_a_promise_and_a_priority_reach_the_worker() -> None:
    sent = request("a", [1, 2], sampling=SAMPLING, slo=SLO(0.5, 0.05, 9.0), slo_class="gold", priority=-3)
    submitted = wire.decode_from_client(wire.encode(wire.Submit(sent)))
    assert isinstance(submitted, wire.Submit)
    dispatched = wire.decode_for_worker(wire.encode(wire.Dispatch(7, submitted.request)))
    assert dispatched == wire.Dispatch(7, sent)


def test_how_a_request_is_served_reaches_the_client() -> None:
    first = TokenDelta("a", (5,), timings=Timings(1.0, 2.0, 3.0), service=Service("w1", 0.7, unattainable=True))
    last = TokenDelta("a", (), finish_reason="length", service=Service("w1", 0.7, strict=False))
    message = wire.WorkerDeltas("e", *wire.split_deltas([first, TokenDelta("a", (6,)), last]))
    received = wire.decode_from_worker(wire.encode(message))
    assert isinstance(received, wire.WorkerDeltas)
    assert wire.join_deltas(received.plain, received.full) == [TokenDelta("a", (6,)), first, last]


def test_a_delta_without_that_part_is_still_one_of_this_protocol() -> None:
    delta = {"request_id": "a", "token_ids": [1], "finish_reason": "stop"}
    frame = msgspec.msgpack.encode(["Deltas", [], [delta]])
    assert wire.decode_for_client(frame) == wire.Deltas((), (TokenDelta("a", (1,), finish_reason="stop"),))
