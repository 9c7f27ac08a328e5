"""Metrics: one table, and every number in it exists."""

from __future__ import annotations

from dataclasses import asdict, replace

import pytest
from prometheus_client.parser import text_string_to_metric_families

from nexusengine.nvml import GpuState
from nexusengine.router.stats import RouterStats
from nexusengine.scheduler.stats import CoreStats
from nexusengine.server.metrics import (
    PREFIX,
    ROUTER_COUNTERS,
    ROUTER_METRICS,
    SERVER_METRICS,
    WINDOW_METRICS,
    WORKER_METRICS,
    Metrics,
    markdown,
)
from nexusengine.server.window import WINDOW_S, SlidingWindow
from nexusengine.types import SLO, RequestOutput, Service, Timings, Verdict
from nexusengine.wire import Cluster, PerfSnapshot, WorkerInfo, WorkerLoad, WorkerState, WorkerStatus
from nexusengine.worker.worker import with_memory

LOADED = WorkerStatus(
    WorkerInfo("w0", "e", 1, "cuda:0", "m"),
    WorkerState.READY,
    "ready",
    1.0,
    outstanding=3,
    load=with_memory(
        lambda: WorkerLoad(
            0,
            perf=PerfSnapshot("online-2", (), 1.1, 7, epoch=1),
            counters=CoreStats(steps=7, device_s=1.5, prediction_bias=-0.2).counters()
            | GpuState(1500.0, 1980.0, 300.0, 60.0, 1e9, ()).counters(),
        )
    )(),
    restarts=2,
)
STARTING = WorkerStatus(WorkerInfo("w1", "e", 2, "cpu", "m"), WorkerState.STARTING, "loading", 0.5, 0, load=None)
CLUSTER = Cluster("r", (LOADED, STARTING), held=4, ledger=5, counters={"faults": 6.0})


def values(metrics: Metrics) -> dict[tuple[str, str], float]:
    """By name and worker."""
    return {
        (s.name.removeprefix(PREFIX), s.labels.get("worker", "")): s.value
        for family in text_string_to_metric_families(metrics.render().decode())
        for s in family.samples
    }


def test_every_worker_metric_is_there_for_a_worker_that_reports() -> None:
    seen = values(Metrics(lambda: CLUSTER))
    for metric in WORKER_METRICS:
        name = f"{metric.name}_total" if metric.kind == "counter" else metric.name
        assert (name, "w0") in seen, f"{metric.name} is read from a counter that no core keeps"
    assert seen["worker_steps_total", "w0"] == 7
    assert seen["worker_device_seconds_total", "w0"] == 1.5
    assert (seen["worker_ready", "w0"], seen["worker_outstanding", "w0"], seen["worker_restarts", "w0"]) == (1, 3, 2)
    assert (seen["router_held", ""], seen["router_ledger", ""]) == (4, 5)
    assert (seen["router_faults_total", ""], seen["router_dispatches_total", ""]) == (6, 0)


def test_a_worker_that_has_not_reported_has_a_state_and_no_invented_numbers() -> None:
    seen = values(Metrics(lambda: CLUSTER))
    assert seen["worker_ready", "w1"] == 0
    assert ("worker_steps_total", "w1") not in seen


def test_without_a_cluster_the_servers_own_metrics_remain() -> None:
    seen = values(Metrics(lambda: None))
    assert seen["requests_in_progress", ""] == 0
    assert not any(name.startswith(("worker_", "router_")) for name, _ in seen)


def test_every_counter_of_the_router_is_one_that_it_keeps() -> None:
    assert {key for key, _ in ROUTER_COUNTERS.values()} <= set(RouterStats().counters())


def test_a_finished_generation_counts_its_tokens_and_latencies() -> None:
    metrics = Metrics(lambda: None)
    metrics.finished(10, 3, 4, Timings(1.0, 1.25, 1.5, 2.5, output_tokens=3))
    metrics.finished(5, 0, 0, Timings(1.0))
    seen = values(metrics)
    assert (seen["prompt_tokens_total", ""], seen["output_tokens_total", ""]) == (15, 3)
    assert seen["cached_prompt_tokens_total", ""] == 4
    sums = {n: seen[f"{n}_seconds_sum", ""] for n in ("queue", "ttft", "tpot", "e2e")}
    assert sums == {"queue": 0.25, "ttft": 0.5, "tpot": 0.5, "e2e": 1.5}
    assert seen["ttft_seconds_count", ""] == 1


def test_names_are_unique_and_on_the_page() -> None:
    names = [m.name for m in (*SERVER_METRICS, *WORKER_METRICS)] + [*ROUTER_METRICS, *ROUTER_COUNTERS, *WINDOW_METRICS]
    assert len(set(names)) == len(names)
    assert all(f"`{PREFIX}{name}`" in markdown() for name in names)
    assert set(asdict(CoreStats())) == set(CoreStats().counters())


def ended(slo_class: str | None, verdict: Verdict | None, **fields: object) -> RequestOutput:
    """TTFT 0.5 s where 0.25 s were predicted, TPOT 0.1 s."""
    return RequestOutput(
        "r",
        (1,),
        "x",
        (5,),
        "length",
        timings=Timings(1.0, 1.25, 1.5, 2.5, output_tokens=11),
        slo=None if verdict is None else SLO(1.0, 0.1),
        slo_class=slo_class,
        verdict=verdict,
        service=Service("w0", 0.25),
        **fields,  # type: ignore[arg-type]
    )


def by_class(metrics: Metrics, name: str) -> dict[tuple[str, ...], float]:
    """By the labels other than a histogram's bound."""
    return {
        tuple(v for k, v in sorted(s.labels.items()) if k != "le"): s.value
        for family in text_string_to_metric_families(metrics.render().decode())
        for s in family.samples
        if s.name == PREFIX + name
    }


def test_verdicts_and_latencies_are_counted_by_class() -> None:
    metrics = Metrics(lambda: None, ["gold"], lambda: 100.0)
    for verdict in (Verdict(True, True), Verdict(True, False), Verdict(False, False, "tpot")):
        metrics.judged(ended("gold", verdict), 11)
    metrics.judged(ended(None, None), 11)
    metrics.missed("gold", "refused")
    metrics.missed(None, "failed")
    assert by_class(metrics, "slo_requests_total") == {
        ("gold", "met"): 2,
        ("gold", "tpot"): 1,
        ("gold", "refused"): 1,
        ("none", "finished"): 1,
        ("none", "failed"): 1,
    }
    assert by_class(metrics, "slo_met_output_tokens_total") == {("gold",): 22}
    assert by_class(metrics, "slo_strict_met_requests_total") == {("gold",): 1}
    assert by_class(metrics, "slo_ttft_seconds_count") == {("gold",): 3, ("none",): 1}
    assert by_class(metrics, "slo_tpot_seconds_sum")["gold",] == pytest.approx(0.3)
    assert by_class(metrics, "slo_predicted_ttft_ratio_sum") == {(): 8.0}
    assert by_class(metrics, "slo_attainment") == {("gold",): 0.5}
    assert by_class(metrics, "slo_attainment_strict") == {("gold",): 0.25}
    assert by_class(metrics, "slo_unattainable_requests_total") == {}


def test_the_error_of_predictions_is_counted_by_worker_and_one_insane_one_does_not_drown_the_others() -> None:
    metrics = Metrics(lambda: None)
    for predicted_s in (0.3, 0.25, 1e7, None):
        output = ended(None, None)
        assert output.service is not None
        metrics.judged(replace(output, service=replace(output.service, predicted_ttft_s=predicted_s)), 11)
    ttft_s = ended(None, None).timings.ttft_s  # type: ignore[union-attr]
    assert ttft_s is not None
    errors = [abs(p / ttft_s - 1.0) for p in (0.3, 0.25)]
    assert by_class(metrics, "ttft_prediction_error_count") == {("w0",): 3}
    assert by_class(metrics, "ttft_prediction_error_sum")["w0",] == pytest.approx(sum(errors) + 10.0)
    assert by_class(metrics, "ttft_unpredicted_requests_total") == {("w0",): 1}


def test_whatever_a_client_names_the_labels_are_those_configured() -> None:
    metrics = Metrics(lambda: None, ["gold"])
    for name in ("custom", "x" * 1000, "none"):
        metrics.judged(ended(name, Verdict(True, True)), 1)
        metrics.missed(name, "failed")
    assert {labels[0] for labels in by_class(metrics, "slo_requests_total")} == {"custom"}


def test_attainment_is_that_of_the_last_minutes() -> None:
    now = 1000.0
    metrics = Metrics(lambda: None, ["gold", "silver"], lambda: now)
    assert by_class(metrics, "slo_attainment") == {}
    metrics.missed("gold", "failed")
    now += 10
    for _ in range(20):
        metrics.judged(ended("silver", Verdict(True, True)), 1)
    assert by_class(metrics, "slo_attainment") == {("gold",): 0.0, ("silver",): 1.0}
    assert by_class(metrics, "slo_goodput_rps") == {("gold",): 0.0, ("silver",): 2.0}
    now += WINDOW_S - 5
    assert by_class(metrics, "slo_attainment") == {("silver",): 1.0}
    assert by_class(metrics, "slo_goodput_rps")["silver",] == pytest.approx(20 / WINDOW_S)
    now += 10
    assert by_class(metrics, "slo_attainment") == {}


def test_a_window_is_bounded_however_much_ends() -> None:
    window = SlidingWindow(0.0)
    for i in range(100_000):
        window.add("gold", True, True, i / 50)
    assert len(window) <= WINDOW_S / 5 + 2
    assert window.totals(2000.0)["gold"].ended == pytest.approx(50 * WINDOW_S, rel=0.02)


def test_a_bias_of_more_than_ten_percent_to_either_side_raises_the_drift_alarm() -> None:
    seen = values(Metrics(lambda: CLUSTER))
    assert seen["worker_step_prediction_bias", "w0"] == -0.2
    assert seen["worker_step_prediction_drift", "w0"] == 1.0
    assert seen["worker_performance_epoch", "w0"] == 1.0


def test_a_worker_reports_its_memory() -> None:
    assert 2**20 < values(Metrics(lambda: CLUSTER))["worker_resident_bytes", "w0"] < 2**40
