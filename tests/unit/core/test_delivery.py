"""What leaves a step: an id and a number for each request that goes on, deltas of their own for the others."""

from __future__ import annotations

from nexusengine.types import SamplingParams
from nexusengine.wire import join_deltas
from tests.support.fakes import FakeExecutor, continuation, make_core, request

PROMPT = [1, 2, 3]


def test_tokens_between_the_first_and_the_last_travel_as_an_id_and_a_number() -> None:
    core = make_core()
    core.add(request("a", PROMPT, 3))
    core.add(request("b", [7, 8], 2))
    expected, other = continuation(PROMPT, 3), continuation([7, 8], 2)
    plain, full = core.step_split()
    assert plain == ()
    assert [(d.request_id, d.token_ids, d.service is None) for d in full] == [
        ("a", (expected[0],), False),
        ("b", (other[0],), False),
    ]
    plain, full = core.step_split()
    assert plain == (("a", (expected[1],)),)
    assert [(d.request_id, d.token_ids, d.finish_reason) for d in full] == [("b", (other[1],), "length")]
    plain, full = core.step_split()
    assert plain == ()
    assert [(d.request_id, d.token_ids, d.finish_reason) for d in full] == [("a", (expected[2],), "length")]
    assert core.step_split() == ((), ())


def test_only_those_who_asked_for_log_probabilities_get_them() -> None:
    core = make_core(FakeExecutor())
    asks = SamplingParams(temperature=0.0, seed=0, max_tokens=4, logprobs=2)
    core.add(request("asks", PROMPT, sampling=asks))
    core.add(request("does not", PROMPT, 4))
    core.step()
    expected = continuation(PROMPT, 2)[1]
    plain, (delta,) = core.step_split()
    assert plain == (("does not", (expected,)),)
    assert (delta.request_id, delta.token_ids) == ("asks", (expected,))
    assert delta.logprobs is not None
    assert [i for i, _ in delta.logprobs[0].top] == [expected, expected + 1]


def test_a_token_that_ends_a_request_is_not_delivered_but_counts() -> None:
    expected = continuation(PROMPT, 8)
    end = next(i for i in range(1, 8) if expected[i] not in expected[:i])
    core = make_core()
    stops = SamplingParams(temperature=0.0, seed=0, max_tokens=8, stop_token_ids=(expected[end],))
    core.add(request("a", PROMPT, sampling=stops))
    deltas = [delta for _ in range(end + 1) for delta in join_deltas(*core.step_split())]
    assert [t for delta in deltas for t in delta.token_ids] == expected[:end]
    assert (deltas[-1].finish_reason, deltas[-1].stop_reason) == ("stop", expected[end])
    assert deltas[-1].timings is not None
    assert deltas[-1].timings.output_tokens == end + 1
    assert not core.has_work
