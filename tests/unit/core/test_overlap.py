"""A core that plans a step while the one before it runs."""

from __future__ import annotations

from nexusengine.clock import VirtualClock
from nexusengine.scheduler.lens.policy import Lens
from nexusengine.types import SLO, SamplingParams
from tests.support.fakes import FakeExecutor, continuation, make_core, request, run


def test_a_step_is_submitted_before_the_one_before_it_is_collected() -> None:
    executor = FakeExecutor(overlaps=True)
    core = make_core(executor)
    core.add(request("a", [1, 2, 3], max_tokens=3))
    assert core.step() == []
    assert len(executor.batches) == 1
    (delta,) = core.step()
    assert delta.token_ids == tuple(continuation([1, 2, 3], 1))
    assert len(executor.batches) == 2


def test_no_step_is_computed_in_vain_for_a_length_that_was_known() -> None:
    executor = FakeExecutor(overlaps=True)
    core = make_core(executor)
    core.add(request("a", [1, 2, 3], max_tokens=5))
    tokens, _ = run(core)["a"]
    assert tokens == continuation([1, 2, 3], 5)
    assert executor.batches == [(1, 3)] + [(1, 1)] * 4


def test_a_row_that_stopped_is_computed_once_in_vain_and_its_token_dropped() -> None:
    expected = continuation([5, 6], 8)
    end = next(t for i, t in enumerate(expected) if i >= 2 and t not in expected[:i])
    sampling = SamplingParams(temperature=0.0, seed=0, max_tokens=8, stop_token_ids=(end,))
    executor = FakeExecutor(overlaps=True)
    core = make_core(executor)
    core.add(request("a", [5, 6], sampling=sampling))
    tokens, last = run(core)["a"]
    assert tokens == expected[: expected.index(end)]
    assert last.finish_reason == "stop"
    assert len(executor.batches) == expected.index(end) + 2
    assert core.stats().generated_tokens == expected.index(end) + 1
    assert core.stats().kv_used_blocks == 0


def test_the_slot_of_a_request_aborted_in_flight_serves_the_next_one() -> None:
    core = make_core(FakeExecutor(overlaps=True))
    core.add(request("a", [1, 2, 3], max_tokens=9))
    core.step()
    core.step()
    assert core.abort("a") is not None
    core.add(request("b", [4, 4, 4, 4, 4], max_tokens=4))
    tokens, last = run(core)["b"]
    assert tokens == continuation([4, 4, 4, 4, 4], 4)
    assert last.finish_reason == "length"


def test_the_last_aborted_request_leaves_a_step_that_is_still_collected() -> None:
    core = make_core(FakeExecutor(overlaps=True))
    core.add(request("a", [1, 2, 3]))
    core.step()
    core.abort("a")
    assert core.has_work
    assert core.step() == []
    assert not core.has_work


def test_answers_under_lens_are_the_same_with_and_without_overlap() -> None:
    answers = []
    for overlaps in (False, True):
        clock = VirtualClock()
        core = make_core(FakeExecutor(clock=clock, overlaps=overlaps, num_blocks=24), clock=clock, policy=Lens())
        for i in range(12):
            slo = SLO(ttft_s=0.5, tpot_s=0.05) if i % 2 else None
            core.add(request(str(i), [i % 3, 1, 2, 3] * (1 + i % 4), max_tokens=3 + i, slo=slo))
        answers.append({name: tokens for name, (tokens, _) in run(core).items()})
    assert answers[0] == answers[1]
