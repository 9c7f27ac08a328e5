"""Every metric: what the server measures itself, and what it reads off the newest picture of the cluster.

docs/metrics.md is made from these tables: python -m nexusengine.obs.metrics
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any, Literal

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, generate_latest
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily
from prometheus_client.registry import Collector

from nexusengine.types import Timings
from nexusengine.wire import Cluster, WorkerState, WorkerStatus

PREFIX = "nexusengine_"
_LATENCY_BUCKETS_S = (0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0, 60.0, 120.0, 300.0)
_TPOT_BUCKETS_S = (0.002, 0.005, 0.01, 0.02, 0.03, 0.05, 0.075, 0.1, 0.15, 0.25, 0.5, 1.0, 2.5)


@dataclass(frozen=True, slots=True)
class ServerMetric:
    """A metric the server keeps."""

    name: str
    kind: Literal["counter", "gauge", "histogram"]
    help: str
    labels: tuple[str, ...] = ()
    buckets: tuple[float, ...] = ()


@dataclass(frozen=True, slots=True)
class WorkerMetric:
    """A metric read off a WorkerStatus; labelled with worker and device. None: not known yet."""

    name: str
    kind: Literal["counter", "gauge"]
    help: str
    read: Callable[[WorkerStatus], float | None]


SERVER_METRICS = (
    ServerMetric("http_requests", "counter", "Generation requests by endpoint and HTTP status", ("endpoint", "status")),
    ServerMetric("requests_in_progress", "gauge", "Generation requests in the server now"),
    ServerMetric("prompt_tokens", "counter", "Prompt tokens of finished generations"),
    ServerMetric("output_tokens", "counter", "Output tokens of finished generations"),
    ServerMetric("cached_prompt_tokens", "counter", "Prompt tokens of finished generations found in the prefix cache"),
    ServerMetric("ttft_seconds", "histogram", "Time from arrival to the first token", (), _LATENCY_BUCKETS_S),
    ServerMetric("tpot_seconds", "histogram", "Mean time per output token after the first", (), _TPOT_BUCKETS_S),
    ServerMetric("e2e_seconds", "histogram", "Time from arrival to the last token", (), _LATENCY_BUCKETS_S),
    ServerMetric("queue_seconds", "histogram", "Time from arrival to the first step", (), _LATENCY_BUCKETS_S),
)


_DRIFT = 0.1


def _total(name: str) -> Callable[[WorkerStatus], float | None]:
    return lambda w: None if w.load is None else w.load.totals.get(name)


WORKER_METRICS = (
    WorkerMetric("worker_ready", "gauge", "1 if the worker takes requests", lambda w: w.state is WorkerState.READY),
    WorkerMetric("worker_restarts", "gauge", "Restarts in the last five minutes", lambda w: w.restarts),
    WorkerMetric("worker_outstanding", "gauge", "Requests dispatched and not finished", lambda w: w.outstanding),
    WorkerMetric("worker_running", "gauge", "Sequences that hold KV blocks", _total("running")),
    WorkerMetric("worker_waiting", "gauge", "Requests waiting in the worker", _total("waiting")),
    WorkerMetric("worker_kv_used_blocks", "gauge", "KV blocks in use", _total("kv_used_blocks")),
    WorkerMetric("worker_kv_total_blocks", "gauge", "KV blocks there are", _total("kv_total_blocks")),
    WorkerMetric("worker_steps", "counter", "Engine steps", _total("steps")),
    WorkerMetric("worker_computed_tokens", "counter", "Tokens computed, prompts and output", _total("computed_tokens")),
    WorkerMetric("worker_generated_tokens", "counter", "Tokens generated", _total("generated_tokens")),
    WorkerMetric("worker_cached_tokens", "counter", "Tokens found in the prefix cache", _total("cached_tokens")),
    WorkerMetric("worker_preemptions", "counter", "Sequences whose KV was taken back", _total("preemptions")),
    WorkerMetric("worker_kv_evictions", "counter", "Cached KV blocks given to others", _total("kv_evictions")),
    WorkerMetric("worker_device_seconds", "counter", "Time the device worked", _total("device_s")),
    WorkerMetric("worker_scheduler_seconds", "counter", "Time planning and bookkeeping took", _total("scheduler_s")),
    WorkerMetric(
        "worker_step_prediction_error",
        "gauge",
        "Mean relative error of predicted step times",
        _total("prediction_error"),
    ),
    WorkerMetric(
        "worker_step_prediction_bias",
        "gauge",
        "The same error with its sign, over about 200 steps: above 0 where steps are shorter than predicted",
        _total("prediction_bias"),
    ),
    WorkerMetric(
        "worker_step_prediction_drift",
        "gauge",
        "1 while that bias is above 10 percent to either side",
        lambda w: None if w.load is None else float(abs(w.load.totals.get("prediction_bias", 0.0)) > _DRIFT),
    ),
    WorkerMetric(
        "worker_slow_steps", "counter", "Steps that took more than 1.6 times what was predicted", _total("slow_steps")
    ),
    WorkerMetric(
        "worker_performance_epoch",
        "gauge",
        "How often the performance model found that the device had changed",
        lambda w: None if w.load is None or w.load.perf is None else w.load.perf.epoch,
    ),
    WorkerMetric(
        "worker_step_bound_coverage", "gauge", "Share of steps within their predicted upper bound", _total("coverage")
    ),
)

ROUTER_METRICS = {
    "router_ledger": "Requests in flight",
    "router_held": "Requests held because no worker can take them",
}


class Metrics:
    """cluster: called at each scrape for the newest picture, None if there is none."""

    def __init__(self, cluster: Callable[[], Cluster | None]) -> None:
        self._registry = CollectorRegistry()
        self._registry.register(_ClusterCollector(cluster))
        self._by_name: dict[str, Any] = {}
        for m in SERVER_METRICS:
            if m.kind == "histogram":
                made: Any = Histogram(PREFIX + m.name, m.help, m.labels, registry=self._registry, buckets=m.buckets)
            else:
                cls = Counter if m.kind == "counter" else Gauge
                made = cls(PREFIX + m.name, m.help, m.labels, registry=self._registry)
            self._by_name[m.name] = made

    def entered(self) -> None:
        self._by_name["requests_in_progress"].inc()

    def left(self, endpoint: str, status: int) -> None:
        self._by_name["requests_in_progress"].dec()
        self._by_name["http_requests"].labels(endpoint, str(status)).inc()

    def finished(self, prompt_tokens: int, output_tokens: int, cached_tokens: int, timings: Timings | None) -> None:
        """One generation came to its end."""
        self._by_name["prompt_tokens"].inc(prompt_tokens)
        self._by_name["output_tokens"].inc(output_tokens)
        self._by_name["cached_prompt_tokens"].inc(cached_tokens)
        if timings is None:
            return
        for name in ("ttft", "tpot", "e2e", "queue"):
            seconds = getattr(timings, f"{name}_s")
            if seconds is not None:
                self._by_name[f"{name}_seconds"].observe(seconds)

    def render(self) -> bytes:
        """The Prometheus text format."""
        return generate_latest(self._registry)


class _ClusterCollector(Collector):
    def __init__(self, cluster: Callable[[], Cluster | None]) -> None:
        self._cluster = cluster

    def collect(self) -> Iterator[Any]:
        cluster = self._cluster()
        if cluster is None:
            return
        for m in WORKER_METRICS:
            cls = CounterMetricFamily if m.kind == "counter" else GaugeMetricFamily
            family = cls(PREFIX + m.name, m.help, labels=("worker", "device"))
            for worker in cluster.workers:
                value = m.read(worker)
                if value is not None:
                    family.add_metric((worker.info.worker_id, worker.info.device), float(value))
            yield family
        for name, help in ROUTER_METRICS.items():
            yield GaugeMetricFamily(PREFIX + name, help, value=getattr(cluster, name.removeprefix("router_")))


def markdown() -> str:
    """docs/metrics.md."""
    rows = [(m.name, m.kind, ", ".join(m.labels), m.help) for m in SERVER_METRICS]
    rows += [(m.name, m.kind, "worker, device", m.help) for m in WORKER_METRICS]
    rows += [(name, "gauge", "", help) for name, help in ROUTER_METRICS.items()]
    lines = [
        "# Metrics",
        "",
        "`GET /metrics`, Prometheus text format. Counters carry the suffix `_total`. This page is the output of",
        "`python -m nexusengine.obs.metrics`.",
        "",
        "| name | type | labels | what it is |",
        "|---|---|---|---|",
        *(f"| `{PREFIX}{name}` | {kind} | {labels} | {help} |" for name, kind, labels, help in rows),
    ]
    return "\n".join(lines) + "\n"


if __name__ == "__main__":
    print(markdown(), end="")
