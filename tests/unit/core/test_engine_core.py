"""The engine core: what a request goes through, and how it ends."""

import threading
from typing import Any

import pytest

from nexusengine.clock import VirtualClock
from nexusengine.errors import ContextTooLong, InvalidRequest, Overloaded
from nexusengine.scheduler.baselines.fcfs import FCFS
from nexusengine.types import SLO, SamplingParams
from nexusengine.wire import WorkerLoad
from tests.support.fakes import FakeExecutor, continuation, make_core, request, run

PROMPT = list(range(1, 20))


def test_the_answer_is_the_models_whatever_the_chunks() -> None:
    for budget in (1, 3, 7, 64):
        core = make_core(policy=FCFS(budget))
        core.add(request("a", PROMPT, 6))
        assert run(core)["a"][0] == continuation(PROMPT, 6)


def test_many_requests_run_in_one_batch_and_leave_nothing_behind() -> None:
    executor = FakeExecutor()
    core = make_core(executor)
    for i in range(20):
        core.add(request(str(i), PROMPT[: 3 + i % 7], 3 + i % 5))
    ended = run(core)
    assert {i: t for i, (t, _) in ended.items()} == {
        str(i): continuation(PROMPT[: 3 + i % 7], 3 + i % 5) for i in range(20)
    }
    assert max(rows for rows, _ in executor.batches) == 8
    stats = core.stats()
    assert (stats.running, stats.waiting, stats.kv_used_blocks, stats.finished_length) == (0, 0, 0, 20)


def test_sequences_that_outgrow_the_cache_are_preempted_and_continue_the_same_text() -> None:
    core = make_core(FakeExecutor(num_blocks=12))
    for i in range(4):
        core.add(request(str(i), PROMPT[i : i + 6], 20))
    ended = run(core)
    assert all(ended[str(i)][0] == continuation(PROMPT[i : i + 6], 20) for i in range(4))
    assert core.stats().preemptions > 0
    assert sum(delta.preemptions for _, delta in ended.values()) == core.stats().preemptions


def test_a_preempted_request_waits_before_those_that_never_ran() -> None:
    core = make_core(FakeExecutor(num_blocks=12), max_running=4)
    for i in range(8):
        core.add(request(str(i), PROMPT[i : i + 6], 20))
    while not core.stats().preemptions:
        core.step()
    first = next(iter(core.scheduler.waiting))
    assert core.scheduler.requests[first].preemptions == 1


def test_an_equal_beginning_is_computed_once() -> None:
    core = make_core()
    core.add(request("a", PROMPT, 2))
    run(core)
    computed = core.stats().computed_tokens
    core.add(request("b", PROMPT, 2))
    tokens, last = run(core)["b"]
    assert tokens == continuation(PROMPT, 2)
    assert last.cached_tokens == 16
    assert core.stats().computed_tokens - computed == len(PROMPT) - 16 + 1


def test_a_stop_token_ends_the_request_and_is_not_part_of_its_text() -> None:
    answer = continuation(PROMPT, 6)
    core = make_core()
    sampling = SamplingParams(temperature=0.0, max_tokens=6, seed=0, stop_token_ids=(answer[3],))
    core.add(request("stop", PROMPT, sampling=sampling))
    core.add(request("eos", PROMPT, 6, eos_token_ids=(answer[2],)))
    ignoring = SamplingParams(temperature=0.0, max_tokens=6, seed=0, ignore_eos=True)
    core.add(request("ignored", PROMPT, sampling=ignoring, eos_token_ids=(answer[2],)))
    ended = run(core)
    assert ended["stop"][0] == answer[:3]
    assert (ended["stop"][1].finish_reason, ended["stop"][1].stop_reason) == ("stop", answer[3])
    assert ended["eos"][0] == answer[:2]
    assert (ended["eos"][1].finish_reason, ended["eos"][1].stop_reason) == ("stop", None)
    assert ended["ignored"][0] == answer
    assert ended["ignored"][1].finish_reason == "length"


def test_without_max_tokens_a_request_runs_until_the_context_is_full() -> None:
    core = make_core(FakeExecutor(max_model_len=40))
    core.add(request("a", PROMPT, None))
    assert len(run(core)["a"][0]) == 40 - len(PROMPT)


@pytest.mark.parametrize(
    ("prompt", "max_tokens", "error", "words"),
    [
        ([], 1, InvalidRequest, "empty"),
        ([1, 97], 1, InvalidRequest, "97"),
        ([1, -3], 1, InvalidRequest, "-3"),
        (list(range(60)), 1, ContextTooLong, "60 tokens"),
        (list(range(40)), 30, ContextTooLong, "30 output tokens"),
    ],
)
def test_what_can_never_be_served_is_refused_at_once(
    prompt: list[int], max_tokens: int, error: type[Exception], words: str
) -> None:
    core = make_core(FakeExecutor(num_blocks=16))
    with pytest.raises(error, match=words):
        core.add(request("a", prompt, max_tokens))
    assert not core.has_work


def test_a_full_queue_refuses_with_a_time_to_come_back() -> None:
    core = make_core(max_waiting=2)
    core.add(request("a", PROMPT))
    core.add(request("b", PROMPT))
    with pytest.raises(Overloaded) as caught:
        core.add(request("c", PROMPT))
    assert caught.value.retry_after_s is not None
    assert caught.value.retry_after_s >= 1.0
    with pytest.raises(InvalidRequest, match="'a'"):
        core.add(request("a", PROMPT))


def test_a_request_can_be_aborted_in_every_state() -> None:
    core = make_core(policy=FCFS(budget=8), max_running=2)
    for i, name in enumerate(("decoding", "prefilling", "waiting")):
        core.add(request(name, [i, *PROMPT], 50))
    for _ in range(4):
        core.step()
    states = {s.request.request_id: s for s in core.scheduler.requests.values()}
    assert states["decoding"].output_tokens > 0
    assert states["prefilling"].output_tokens == 0
    for name in ("waiting", "prefilling", "decoding"):
        delta = core.abort(name)
        assert delta is not None
        assert delta.finish_reason == "abort"
        core.check()
    assert core.abort("decoding") is None
    assert (core.has_work, core.kv.used_blocks) == (False, 0)


def test_a_deadline_ends_a_request_that_is_late() -> None:
    clock = VirtualClock()
    core = make_core(FakeExecutor(clock=clock, step_s=1.0), clock=clock)
    core.add(request("late", PROMPT, 50, deadline_s=3.5))
    core.add(request("in time", PROMPT, 2, deadline_s=30.0))
    ended = run(core)
    assert ended["late"][1].error_code == "deadline_exceeded"
    assert ended["late"][0] == continuation(PROMPT, 50)[: len(ended["late"][0])]
    assert ended["in time"][1].finish_reason == "length"


def test_logits_that_are_not_finite_fail_their_request_and_no_other() -> None:
    core = make_core(FakeExecutor(poison=frozenset({50})))
    core.add(request("bad", [50, 1, 2], 3))
    core.add(request("good", [1, 2, 3], 3))
    ended = run(core)
    assert ended["bad"][1].error_code == "internal_error"
    assert ended["good"][0] == continuation([1, 2, 3], 3)


def test_what_was_computed_from_broken_numbers_is_not_reused() -> None:
    core = make_core(FakeExecutor(poison=frozenset({50})))
    core.add(request("good", [1] * 12, 1))
    run(core)
    core.add(request("bad", [*[1] * 12, 50, *[2] * 11], 3))
    assert run(core)["bad"][1].error_code == "internal_error"
    core.add(request("good", [1] * 12, 3))
    tokens, last = run(core)["good"]
    assert (tokens, last.cached_tokens) == (continuation([1] * 12, 3), 0)


def test_logprobs_stay_with_their_tokens_when_rows_end_beside_them() -> None:
    core = make_core()
    lengths = {"none": None, "zero": 0, "two": 2}
    for name, wanted in lengths.items():
        sampling = SamplingParams(temperature=0.0, max_tokens=2 if name == "zero" else 5, seed=0, logprobs=wanted)
        core.add(request(name, [len(name), *PROMPT], sampling=sampling))
    seen: dict[str, list[tuple[int, float, int]]] = {name: [] for name in lengths}
    while core.has_work:
        for delta in core.step():
            assert (delta.logprobs is None) == (delta.request_id == "none")
            for token, item in zip(delta.token_ids, delta.logprobs or (), strict=delta.logprobs is not None):
                assert item.token_id == token
                assert item.logprob == pytest.approx(token / -100)
                assert [i for i, _ in item.top] == [token + k for k in range(lengths[delta.request_id] or 0)]
                seen[delta.request_id].append((token, item.logprob, len(item.top)))
    assert [len(items) for items in seen.values()] == [0, 2, 5]


@pytest.mark.parametrize(
    ("fields", "words"),
    [
        ({"sampling": SamplingParams(max_tokens=3)}, "seed"),
        ({"priority": 2**40}, str(2**40)),
    ],
)
def test_a_request_that_cannot_be_written_down_is_refused_and_takes_no_place(
    fields: dict[str, Any], words: str
) -> None:
    core = make_core()
    with pytest.raises(InvalidRequest, match=words):
        core.add(request("a", PROMPT, **fields))
    core.check()
    assert not core.has_work


def test_timings_tell_queueing_first_token_and_end() -> None:
    clock = VirtualClock(100.0)
    core = make_core(FakeExecutor(clock=clock, step_s=0.5), clock=clock)
    core.add(request("a", PROMPT, 3, arrival_s=99.0))
    timings = run(core)["a"][1].timings
    assert timings is not None
    assert (timings.queue_s, timings.ttft_s, timings.tpot_s, timings.e2e_s) == (1.0, 1.5, 0.5, 2.5)


def test_every_step_is_recorded_with_prediction_and_outcome() -> None:
    core = make_core()
    core.add(request("a", PROMPT, 3))
    run(core)
    records = list(core.records)
    assert [r.tokens for r in records] == [19, 1, 1]
    assert [r.reasons for r in records] == [{"admitted": 1}, {"decode": 1}, {"decode": 1}]
    assert all(r.predicted_s > 0 and r.upper_s >= r.predicted_s and r.device_s == 0.01 for r in records)


def test_the_published_load_says_what_the_worker_is_doing() -> None:
    clock = VirtualClock()
    core = make_core(FakeExecutor(clock=clock, step_s=0.02), clock=clock, policy=FCFS(budget=8), max_running=1)
    core.last_dispatch_seq = 7
    core.add(request("a", PROMPT, 5))
    core.step()
    core.last_dispatch_seq = 8
    load = core.load()
    assert (load.last_dispatch_seq, load.running, load.pending_tokens, load.kv_used_blocks) == (7, 1, 11, 2)
    assert (load.pending[0].left_tokens, load.pending[0].done_tokens) == (11, 8)


def test_the_load_of_a_running_step_can_be_read_from_another_thread() -> None:
    clock = VirtualClock(5.0)
    loads: list[WorkerLoad] = []

    class Slow(FakeExecutor):
        def submit(self, batch: object) -> None:
            super().submit(batch)  # type: ignore[arg-type]
            clock.advance(0.25)
            thread = threading.Thread(target=lambda: loads.append(core.load()))
            thread.start()
            thread.join()

    core = make_core(Slow(clock=clock), clock=clock)
    core.last_dispatch_seq = 3
    core.add(request("a", PROMPT, 2, slo=SLO(ttft_s=1.0, tpot_s=0.1), arrival_s=5.0))
    core.last_dispatch_seq = 4
    core.step()
    assert [(x.last_dispatch_seq, x.step, x.step_running_s) for x in loads] == [(3, 1, 0.25)]
    assert loads[0].step_upper_s == core.records[0].upper_s
    assert (loads[0].pending[0].deadline_s, loads[0].pending[0].tpot_s) == (6.0, 0.1)
    after = core.load()
    assert (after.last_dispatch_seq, after.step_running_s, after.decodes, after.decode_kv_tokens) == (4, 0.0, 1, 19)
    assert after.tightest_tpot_s == 0.1


def test_the_mean_length_of_answers_counts_finished_ones_only() -> None:
    core = make_core()
    core.add(request("short", PROMPT, 2))
    core.add(request("long", PROMPT[1:], 20))
    for _ in range(10):
        core.step()
    assert core.load().mean_output_tokens == 2.0


def test_statistics_are_a_picture_that_does_not_change_afterwards() -> None:
    core = make_core()
    core.add(request("a", PROMPT, 2))
    before = core.stats()
    run(core)
    assert (before.waiting, before.steps, core.stats().steps) == (1, 0, 2)


def test_an_executor_that_fails_leaves_a_core_that_can_end_its_requests() -> None:
    class Failing(FakeExecutor):
        def collect(self) -> object:  # type: ignore[override]
            raise RuntimeError("the device is gone")

    core = make_core(Failing())
    core.add(request("a", PROMPT, 2))
    core.add(request("b", PROMPT, 2))
    with pytest.raises(RuntimeError, match="gone"):
        core.step()
    assert core.load().step_running_s == 0.0
    deltas = core.fail_all("internal_error", "a step failed")
    assert [(d.request_id, d.error_code, d.error_message) for d in deltas] == [
        ("a", "internal_error", "a step failed"),
        ("b", "internal_error", "a step failed"),
    ]
    core.check()
    assert (core.has_work, core.kv.used_blocks) == (False, 0)


def test_deadlines_of_finished_requests_do_not_pile_up() -> None:
    core = make_core()
    for i in range(200):
        core.add(request(str(i), PROMPT, 1, deadline_s=1e6 + i))
        run(core)
    assert len(core._timeouts) <= 2 * 40 + 1
