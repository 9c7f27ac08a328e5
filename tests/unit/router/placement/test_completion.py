"""Requests without an SLO: spread by when a worker is done with all it was given, whatever the age of its report."""

from __future__ import annotations

import dataclasses
from collections import Counter

import msgspec
import numpy as np
import pytest

from nexusengine.router.placement.alike import error_of, models_of
from nexusengine.router.placement.completion import completion_s, expected_output
from nexusengine.router.placement.forecast_matrix import ForecastMatrix
from nexusengine.router.placement.policy import Place, PlacementRequest, WorkerView
from nexusengine.router.placement.prism import Prism
from nexusengine.wire import WorkerInfo, WorkerLoad
from tests.support.router_fakes import given_to, load, pending, perf, request, view

FEW_STEPS = msgspec.structs.replace(perf(0.1), steps=3)


def burst(reports: dict[str, WorkerLoad | None], requests: list[PlacementRequest]) -> list[list[PlacementRequest]]:
    """What each worker gets of requests that come at once, on top of what their reports say."""
    policy = Prism()
    sent: dict[str, list[PlacementRequest]] = {w: [] for w in reports}
    for r in requests:
        views = [
            dataclasses.replace(view(w, **given_to(*rs, worker=w), unreported=tuple(rs)), load=reports[w])
            for w, rs in sent.items()
        ]
        decision = policy.place(r, views, 1.0)
        assert isinstance(decision, Place)
        sent[decision.worker_id].append(r)
    return list(sent.values())


NOT_ANY_MORE = load(decodes=16, kv_used_blocks=600)
STILL_WAITING = load(pending=tuple(pending(float("inf"), 200) for _ in range(16)))


@pytest.mark.parametrize(
    "reports",
    [
        (None, None),
        (None, load()),
        (load(), None),
        (load(), NOT_ANY_MORE),
        (NOT_ANY_MORE, STILL_WAITING),
        (load(mean_output_tokens=0.0), load()),
        (load(), msgspec.structs.replace(load(), perf=FEW_STEPS)),
        (load(), msgspec.structs.replace(load(), perf=perf(1.03))),
        (load(), msgspec.structs.replace(load(), perf=perf(1.4, quantile=2.0))),
    ],
    ids=["none", "one", "other", "decodes", "waiting", "no answer yet", "few steps", "own scatter", "noisy machine"],
)
@pytest.mark.parametrize("lengths", [(12, 12), (10, 400)], ids=["alike", "unlike lengths"])
def test_a_burst_over_equal_workers_is_spread_evenly(
    reports: tuple[WorkerLoad | None, ...], lengths: tuple[int, int]
) -> None:
    drawn = np.random.default_rng(1).integers(*lengths, size=32, endpoint=True).tolist()
    requests = [request(str(n), prompt=prompt, slo=None) for n, prompt in enumerate(drawn)]
    first, second = burst({"w0": reports[0], "w1": reports[1]}, requests)
    assert abs(len(first) - len(second)) <= 2


def test_reports_that_come_in_the_middle_of_a_burst_change_nothing() -> None:
    policy, counts = Prism(), Counter[str]()
    reports: dict[str, WorkerLoad | None] = {"w0": None, "w1": None}
    sent: dict[str, list[PlacementRequest]] = {"w0": [], "w1": []}
    for n in range(32):
        views = [
            dataclasses.replace(
                view(w, **given_to(*rs), unreported=tuple(rs[(r.last_dispatch_seq if (r := reports[w]) else 0) :])),
                load=reports[w],
            )
            for w, rs in sent.items()
        ]
        decision = policy.place(request(str(n), prompt=40, slo=None), views, 1.0 + 0.01 * n)
        assert isinstance(decision, Place)
        counts[decision.worker_id] += 1
        sent[decision.worker_id].append(request(str(n), prompt=40, slo=None))
        late = "w0" if n % 8 < 4 else "w1"  # the other's is on its way
        reports[late] = load(decodes=len(sent[late]), last_dispatch_seq=len(sent[late]))
    assert abs(counts["w0"] - counts["w1"]) <= 1


def test_a_worker_is_done_when_all_prompts_are_computed_and_all_rounds_of_decodes_are_over() -> None:
    info = WorkerInfo("w", "e", 1, "cpu", "m", max_batch_tokens=2048, block_size=16, max_running=8)
    matrix = ForecastMatrix()
    given = [request(str(n), prompt=100, slo=None) for n in range(15)]
    matrix.update([view("w", load(), info=info, **given_to(*given))], 0.0)
    service_s = 100 * (0.005 / 2048 + 20e-6) + 1e-9 * 5000
    step_s = 0.005 + 8 * (20e-6 + 40e-9 * 125)
    done_s = completion_s(matrix.estimates, 100, np.array([service_s]), 50.0)
    assert done_s[0] == pytest.approx(16 * service_s + 2 * 50 * step_s, rel=0.01)


def test_the_output_is_what_the_workers_see_within_what_the_request_allows() -> None:
    known = np.array([0.0, 60.0, 100.0])
    assert expected_output(request(max_tokens=500), known) == 80.0
    assert expected_output(request(max_tokens=20), known) == 20.0
    assert expected_output(request(max_tokens=20), np.zeros(3)) == 20.0
    assert expected_output(request(max_tokens=0), np.zeros(3)) == 256.0


def test_a_cached_prefix_decides_where_it_saves_more_than_a_hundredth() -> None:
    r = request(prompt=4000, slo=None, cached_tokens={"w1": 3968})
    first, second = burst({"w0": load(), "w1": load()}, [dataclasses.replace(r, request_id=str(n)) for n in range(4)])
    assert (len(first), len(second)) == (0, 4)
    r = request(prompt=100, slo=None, cached_tokens={"w1": 64})
    first, second = burst({"w0": load(), "w1": load()}, [dataclasses.replace(r, request_id=str(n)) for n in range(32)])
    assert len(first) == len(second)


def test_where_others_have_promises_it_does_no_harm_if_it_can_be_done_elsewhere() -> None:
    promised = view("promised", msgspec.structs.replace(load(decodes=1850), decode_kv_tokens=150_000))
    busy = view("busy", load(speed=0.5), **given_to(*(request(str(n), slo=None) for n in range(40))))
    decision = Prism().place(request(slo=None), [promised, busy], 0.0)
    assert isinstance(decision, Place)
    assert decision.worker_id == "busy"


def of_kind(device: str, perf_of: msgspec.Struct | None) -> WorkerView:
    info = WorkerInfo(device, "e", 1, device, "m")
    report = msgspec.structs.replace(load(), perf=perf_of)
    return view(device, report, info=info)


def test_a_new_worker_is_as_fast_as_the_one_alike_that_has_seen_most_until_it_has_seen_ten_steps() -> None:
    known, more, ten = (msgspec.structs.replace(perf(), steps=n) for n in (5, 900, 10))
    workers = [of_kind("cpu:1", p) for p in (known, more, None, ten)] + [of_kind("cpu:2", p) for p in (None, known)]
    assert models_of(workers) == [more, more, more, ten, known, known]
    assert models_of([of_kind("a", None), of_kind("b", more)]) == [None, more]


def test_predictions_err_by_the_scatter_that_the_model_has_seen() -> None:
    assert error_of(perf(quantile=1.1)) == pytest.approx(0.1)
    assert error_of(perf(quantile=1.001)) == 0.025
    assert error_of(perf(quantile=5.0)) == error_of(None) == error_of(FEW_STEPS) == 0.4
