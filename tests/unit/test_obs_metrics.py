"""Metrics: one table, and every number in it exists."""

from __future__ import annotations

from dataclasses import asdict

from prometheus_client.parser import text_string_to_metric_families

from nexusengine.core.stats import CoreStats
from nexusengine.obs.metrics import PREFIX, ROUTER_METRICS, SERVER_METRICS, WORKER_METRICS, Metrics, markdown
from nexusengine.types import Timings
from nexusengine.wire import Cluster, PerfWeights, WorkerInfo, WorkerLoad, WorkerState, WorkerStatus

LOADED = WorkerStatus(
    WorkerInfo("w0", "e", 1, "cuda:0", "m"),
    WorkerState.READY,
    "ready",
    1.0,
    outstanding=3,
    load=WorkerLoad(
        0,
        perf=PerfWeights("online-1", (), 1.1, 7, epoch=1),
        totals=CoreStats(steps=7, device_s=1.5, prediction_bias=-0.2).totals(),
    ),
    restarts=2,
)
STARTING = WorkerStatus(WorkerInfo("w1", "e", 2, "cpu", "m"), WorkerState.STARTING, "loading", 0.5, 0, load=None)
CLUSTER = Cluster("r", (LOADED, STARTING), held=4, ledger=5)


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


def test_a_worker_that_has_not_reported_has_a_state_and_no_invented_numbers() -> None:
    seen = values(Metrics(lambda: CLUSTER))
    assert seen["worker_ready", "w1"] == 0
    assert ("worker_steps_total", "w1") not in seen


def test_without_a_cluster_the_servers_own_metrics_remain() -> None:
    seen = values(Metrics(lambda: None))
    assert seen["requests_in_progress", ""] == 0
    assert not any(name.startswith(("worker_", "router_")) for name, _ in seen)


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
    names = [m.name for m in (*SERVER_METRICS, *WORKER_METRICS)] + list(ROUTER_METRICS)
    assert len(set(names)) == len(names)
    assert all(f"`{PREFIX}{name}`" in markdown() for name in names)
    assert set(asdict(CoreStats())) == set(CoreStats().totals())


def test_a_bias_of_more_than_ten_percent_to_either_side_raises_the_drift_alarm() -> None:
    seen = values(Metrics(lambda: CLUSTER))
    assert seen["worker_step_prediction_bias", "w0"] == -0.2
    assert seen["worker_step_prediction_drift", "w0"] == 1.0
    assert seen["worker_performance_epoch", "w0"] == 1.0
