"""A worker's queue rolled forward: speeds, deadlines, what can be in time and what cannot."""

from __future__ import annotations

import dataclasses
from typing import Any

import msgspec
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from nexusengine.forecast.speed import predict_speed, predictor_of
from nexusengine.perf.features import StepFeatures
from nexusengine.perf.model import Predictor
from nexusengine.router.placement.forecast import Forecast, forecast, snapshot
from nexusengine.router.placement.forecast_matrix import ForecastMatrix
from nexusengine.router.placement.policy import WorkerView
from nexusengine.scheduler.baselines.fcfs import FCFS
from nexusengine.scheduler.moore_hodgson import defer
from nexusengine.scheduler.registry import make_policy
from nexusengine.wire import PolicyTraits
from tests.support.router_fakes import BATCH, INTERACTIVE, load, pending, perf, request, view

BY_TOKENS = FCFS().traits


def model() -> Predictor:
    return predictor_of(perf())


def of(v: WorkerView) -> Forecast:
    return forecast(snapshot(v, 0.0, v.load.perf if v.load else None), v)


def test_an_idle_worker_fills_its_steps_to_the_token_limit() -> None:
    v = predict_speed(model(), 1.0, 0, 0.0, float("inf"), 2048, PolicyTraits())
    assert v.chunk_tokens == 2048
    assert v.per_token_s == pytest.approx((0.005 + 2048 * 20e-6) / 2048)
    assert v.step_s == pytest.approx(0.005 + 2048 * 20e-6)


def test_steps_beside_decodes_stay_within_the_tightest_tpot_and_prompts_get_what_is_left() -> None:
    v = predict_speed(model(), 1.0, 50, 100_000.0, 0.025, 2048, PolicyTraits())
    step = model().predict(StepFeatures(50 + int(v.chunk_tokens), 51, 1, 0.0, 100_000)).mean_s
    assert step == pytest.approx(0.025 - 0.0005, rel=0.01)
    assert v.per_token_s == pytest.approx(v.step_s / v.chunk_tokens)
    slower = predict_speed(model(), 1.25, 50, 100_000.0, 0.025, 2048, PolicyTraits())
    assert slower.per_token_s > v.per_token_s, "an uncertain model leaves more room"
    unpaced = predict_speed(model(), 1.0, 50, 100_000.0, 0.025, 2048, BY_TOKENS)
    assert unpaced.chunk_tokens == 2048 - 50


def test_what_another_row_and_another_kv_token_add_is_read_off_the_model() -> None:
    v = predict_speed(model(), 1.0, 10, 5000.0, 0.05, 2048, PolicyTraits())
    assert v.decode_s == pytest.approx(0.005 + 10 * 20e-6 + 5000 * 40e-9)
    assert v.per_row_s == pytest.approx(20e-6)
    assert v.per_kv_s == pytest.approx(40e-9)
    idle = predict_speed(model(), 1.0, 0, 0.0, float("inf"), 2048, PolicyTraits())
    assert idle.per_pair_s == pytest.approx(1e-9), "pairs make a step that tokens limit longer"
    paced = predict_speed(model(), 1.0, 0, 0.0, float("inf"), 2048, PolicyTraits(step_s=0.02))
    assert paced.per_pair_s == pytest.approx(1e-9 * paced.step_s / (paced.step_s - paced.first_step_s))


def test_prompts_are_ahead_by_deadline_with_undue_ones_last() -> None:
    f = of(view("w", load(pending=(pending(0.5, 100), pending(1.0, 200), pending(float("inf"), 300)))))
    assert f.keys.tolist() == [0.5, 1.0, float("inf")]
    steps = np.diff(f.ahead_s)
    assert steps == pytest.approx(np.array([1, 2, 3]) * steps[0], rel=0.02)


def test_relegated_and_hopeless_prompts_load_nobody_but_count_as_late_work() -> None:
    reported = load(pending=(pending(0.5, 100), pending(0.1, 50_000)), relegated=1, relegated_tokens=400)
    reported = msgspec.structs.replace(reported, pending_tokens=100 + 50_000 + 400)
    f = of(view("w", reported))
    assert f.keys.tolist() == [0.5]
    v = snapshot(view("w", reported), 0.0, reported.perf).speed
    hopeless = 50_000 * (v.per_token_s + v.per_pair_s * 25_000)
    assert f.estimates.late_s == pytest.approx(400 * v.per_token_s + hopeless)


def test_what_was_dispatched_since_the_report_is_in_line_by_its_deadline() -> None:
    reported = load(pending=(pending(0.3, 100), pending(2.0, 100)))
    new = request(prompt=500, arrival_s=0.1)  # due at 0.6
    f = of(view("w", reported, unreported=(new,)))
    assert f.keys.tolist() == [0.3, pytest.approx(0.6), 2.0]
    per_token = np.diff(f.ahead_s)
    assert per_token[1] == pytest.approx(5 * per_token[0], rel=0.02)
    assert f.estimates.tightest_tpot_s == 0.05


def test_a_cached_beginning_makes_a_dispatch_shorter() -> None:
    plain, cached = request(prompt=800), request(prompt=800, cached_tokens={"w": 640})
    work = [of(view("w", unreported=(r,))).ahead_s[-1] for r in (plain, cached)]
    assert work[1] == pytest.approx(work[0] * 160 / 800, rel=0.1)
    assert of(view("other", unreported=(cached,))).ahead_s[-1] == work[0]


def test_requests_that_stream_already_are_decodes() -> None:
    before, after = of(view("w")), of(view("w", started=(request(prompt=4000, slo=BATCH),)))
    assert after.ahead_s[-1] == 0.0
    assert after.estimates.decode_s == pytest.approx(before.estimates.decode_s + 20e-6 + 4000 * 40e-9)
    assert after.estimates.tightest_tpot_s == BATCH.tpot_s


def test_of_a_long_queue_only_a_part_decodes_at_once() -> None:
    """Answers of 100 tokens within 50 ms each stay 5 s, and the queue takes 0.7 s or 70 s."""
    short, long = (load(pending=tuple(pending(500.0, 3000) for _ in range(n))) for n in (10, 64))
    long = msgspec.structs.replace(long, pending_tokens=3_000_000)
    few, many = of(view("w", short)), of(view("w", long))
    assert few.estimates.kv_tokens == 30_000
    drain_s = many.estimates.rest_s + many.ahead_s[-1]
    assert drain_s > 50.0
    assert many.estimates.kv_tokens == pytest.approx(3_000_000 * 5.0 / drain_s)


def test_slack_is_how_long_later_ones_can_be_delayed() -> None:
    f = of(view("w", load(pending=(pending(0.5, 1000), pending(1.0, 1000)))))
    rest, (_, first, both) = f.estimates.rest_s, f.ahead_s
    assert f.slack_s.tolist() == [
        pytest.approx(min(0.5 - rest - first, 1.0 - rest - both)),
        pytest.approx(1.0 - rest - both),
        float("inf"),
    ]


def test_an_engine_that_serves_in_order_of_arrival_makes_new_requests_wait_for_all() -> None:
    v = view("w", load(pending=(pending(9.0, 1000), pending(0.001, 90_000))))
    v = dataclasses.replace(v, info=msgspec.structs.replace(v.info, traits=FCFS().traits))
    matrix = ForecastMatrix()
    matrix.update([v], 0.0)
    assert matrix.position(0.5, 100.0).tolist() == [2]
    assert matrix.slack_s[0, 2] == float("inf")


def served_by(spec: str, *prompts: Any, **fields: Any) -> ForecastMatrix:
    """The matrix of a worker with this engine policy, whose prompts wait."""
    v = view("w", load(pending=prompts))
    matrix = ForecastMatrix()
    matrix.update(
        [dataclasses.replace(v, info=msgspec.structs.replace(v.info, traits=make_policy(spec).traits, **fields))], 0.0
    )
    return matrix


@pytest.mark.parametrize("spec", ["fcfs", "sarathi", "prefill-first", "vllm", "lens:order=0"])
def test_where_prompts_are_served_as_they_came_a_new_request_waits_for_all(spec: str) -> None:
    matrix = served_by(spec, pending(9.0, 1000), pending(0.001, 900))
    assert matrix.position(0.5, 10.0).tolist() == [2]
    assert matrix.slack_s[0, 2] == float("inf")


@pytest.mark.parametrize("spec", ["srpt", "srpt:relegate=0", "paper-lens"])
def test_where_the_shortest_goes_first_a_new_request_waits_for_those_that_are_shorter(spec: str) -> None:
    matrix = served_by(spec, pending(9.0, 3000), pending(9.5, 500), pending(9.7, 1000))
    assert [matrix.position(due, left).tolist() for due, left in ((0.5, 700.0), (0.5, 5000.0), (99.0, 100.0))] == [
        [1],
        [3],
        [0],
    ]


def test_who_is_late_is_out_of_the_way_only_where_the_policy_relegates() -> None:
    prompts = pending(0.001, 2000), pending(9.0, 1000)
    for spec, ahead in (("lens", 1), ("edf:relegate=1", 1), ("edf", 2), ("srpt", 1), ("srpt:relegate=0", 2)):
        matrix = served_by(spec, *prompts)
        assert matrix.count.tolist() == [ahead], spec
        assert (matrix.estimates.late_s[0] > 0.0) == (ahead == 1), spec
        assert matrix.slack_s[0, 0] > 8.0, "one that is late already is not made late"


def test_steps_are_as_long_as_the_policy_declares() -> None:
    def step_s(spec: str, tightest_tpot_s: float = float("inf")) -> float:
        return predict_speed(model(), 1.0, 10, 5000.0, tightest_tpot_s, 32_768, make_policy(spec).traits).step_s

    assert step_s("paper-lens") == pytest.approx(0.4995, rel=0.01)
    whole_s = model().predict(StepFeatures(32_768, 11, 1, 0.0, 5000)).mean_s
    assert step_s("lens") == pytest.approx(whole_s, rel=0.01)
    for spec in ("fcfs", "vllm", "edf", "srpt", "prefill-first", "lens:limit=0"):
        assert step_s(spec, 0.05) == pytest.approx(whole_s, rel=0.01), spec
    for spec in ("sarathi", "fcfs:budget=512", "vllm:budget=512", "edf:budget=512", "lens:limit=0,budget=512"):
        assert step_s(spec, 0.05) == pytest.approx(model().predict(StepFeatures(512, 11, 1, 0.0, 5000)).mean_s), spec
    assert step_s("lens", 0.05) == pytest.approx(0.0495, rel=0.01)


def test_what_the_report_only_sums_up_is_behind_all_that_are_listed() -> None:
    listed = tuple(pending(0.1 * (i + 1), 10) for i in range(64))
    reported = msgspec.structs.replace(load(pending=listed), pending_tokens=640 + 5000)
    f = of(view("w", reported))
    assert len(f.keys) == 65
    assert f.keys[-1] == f.keys[-2] == pytest.approx(6.4)
    assert np.diff(f.ahead_s)[-1] == pytest.approx(5000 * f.estimates.per_token_s)


def test_a_worker_without_a_report_is_idle_and_as_fast_as_an_untaught_model_says() -> None:
    v = view("w")
    f = of(dataclasses.replace(v, load=None))
    assert f.ahead_s.tolist() == [0.0]
    assert f.estimates.per_token_s > 0.0
    assert f.estimates.kv_capacity == float("inf")


jobs = st.lists(st.tuples(st.integers(1, 20), st.integers(1, 60)), min_size=0, max_size=9)


@settings(deadline=None)
@given(jobs)
def test_as_many_jobs_are_in_time_as_can_be(pairs: list[tuple[int, int]]) -> None:
    pairs = sorted(pairs, key=lambda p: p[1])
    service, room = (np.array([float(p[i]) for p in pairs]) for i in (0, 1))
    keep = ~defer(service, room)
    done = np.cumsum(service[keep])
    assert (done <= room[keep]).all()
    best = 0
    for mask in range(1 << len(pairs)):
        chosen = [p for i, p in enumerate(pairs) if mask >> i & 1]
        if all(t <= d for t, (_, d) in zip(np.cumsum([s for s, _ in chosen]), chosen, strict=True)):
            best = max(best, len(chosen))
    assert keep.sum() == best


@given(jobs, st.tuples(st.integers(1, 20), st.integers(1, 60)))
def test_slack_tells_whether_a_new_request_makes_another_late(
    pairs: list[tuple[int, int]], new: tuple[int, int]
) -> None:
    """Against Moore and Hodgson's count with the new one, for queues in which all are in time without it."""
    per_token = of(view("w")).estimates.per_token_s
    rest = of(view("w", load(pending=(pending(1.0, 1),)))).estimates.rest_s
    queue = tuple(pending(rest + 100 * per_token * d, 100 * s) for s, d in sorted(pairs, key=lambda p: p[1]))
    f = of(view("w", load(pending=queue)))
    if len(f.keys) < len(queue):
        return
    matrix = ForecastMatrix()
    matrix.update([view("w", load(pending=queue))], 0.0)
    due = rest + 100 * per_token * new[1]
    position = int(matrix.position(due, 0.0)[0])
    service = np.insert(np.diff(f.ahead_s), position, 100 * new[0] * per_token)
    limits = np.insert(f.keys, position, due) - rest
    behind = np.cumsum(service)[position + 1 :] > limits[position + 1 :]
    assert (matrix.slack_s[0, position] < service[position]) == bool(behind.any())


def test_a_matrix_follows_views_that_grow_shrink_and_change_places() -> None:
    matrix = ForecastMatrix()
    long = view("a", load(pending=tuple(pending(1.0 + i, 1) for i in range(64))), unreported=(request(),) * 100)
    short = view("b", load(pending=(pending(1.0, 7),)))
    for views in ([long, short], [short, long], [short], [long, short]):
        matrix.update(views, 0.0)
        fresh = ForecastMatrix()
        fresh.update(views, 0.0)
        for i, v in enumerate(views):
            f = of(v)
            assert matrix.ahead_s[i, len(f.keys)] == f.ahead_s[-1]
            assert matrix.position(float("inf"), 0.0)[i] == len(f.keys)
            assert [a[i] for a in matrix.estimates] == [a[i] for a in fresh.estimates]
            assert matrix.index[v.worker_id] == i
            assert matrix.cached_tokens(request(cached_tokens={v.worker_id: 160}))[i] == 160  # type: ignore[index]


def test_interactive_requests_are_due_before_batch_ones() -> None:
    f = of(view("w", unreported=(request("b", slo=BATCH), request("i", slo=INTERACTIVE))))
    assert f.keys.tolist() == [0.5, 30.0]
