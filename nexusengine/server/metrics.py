"""Every metric: what the server measures itself, and what it reads off the newest picture of the cluster.

docs/metrics.md is made from these tables: python -m nexusengine.server.metrics
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from typing import Any, Literal

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, generate_latest
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily
from prometheus_client.registry import Collector

from nexusengine.server.window import WINDOW_S, Counts, SlidingWindow
from nexusengine.slo.resolve import CUSTOM, NONE
from nexusengine.types import Missed, RequestOutput, Service, Timings
from nexusengine.wire import Cluster, WorkerState, WorkerStatus

PREFIX = "nexusengine_"
_LATENCY_BUCKETS_S = (0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0, 60.0, 120.0, 300.0)
_MOST_OFF = 10.0
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
    ServerMetric("prompt_tokens", "counter", "Prompt tokens of generations, from their first token on"),
    ServerMetric("output_tokens", "counter", "Output tokens of generations, also of those cut off"),
    ServerMetric("cached_prompt_tokens", "counter", "Prompt tokens found in the prefix cache"),
    ServerMetric("recorded_requests", "counter", "Generations written to the trace (--record-trace)"),
    ServerMetric("unrecorded_requests", "counter", "Generations left out of it: the disk is full, or it is too slow"),
    ServerMetric("ttft_seconds", "histogram", "Time from arrival to the first token", (), _LATENCY_BUCKETS_S),
    ServerMetric("tpot_seconds", "histogram", "Mean time per output token after the first", (), _TPOT_BUCKETS_S),
    ServerMetric("e2e_seconds", "histogram", "Time from arrival to the last token", (), _LATENCY_BUCKETS_S),
    ServerMetric("queue_seconds", "histogram", "Time from arrival to the first step", (), _LATENCY_BUCKETS_S),
    ServerMetric(
        "slo_requests",
        "counter",
        "Generations by SLO class and verdict: met, what was missed first, or finished for those without an SLO",
        ("class", "verdict"),
    ),
    ServerMetric("slo_strict_met_requests", "counter", "Of those met, how many by the strict contract", ("class",)),
    ServerMetric("slo_met_output_tokens", "counter", "Output tokens of generations that met their SLO", ("class",)),
    ServerMetric(
        "slo_unattainable_requests",
        "counter",
        "Generations whose SLO the device surely could not meet alone",
        ("class",),
    ),
    ServerMetric(
        "slo_ttft_seconds", "histogram", "Time to the first token by SLO class", ("class",), _LATENCY_BUCKETS_S
    ),
    ServerMetric("slo_tpot_seconds", "histogram", "Mean time per token by SLO class", ("class",), _TPOT_BUCKETS_S),
    ServerMetric(
        "slo_predicted_ttft_ratio",
        "histogram",
        "Time to the first token over what was predicted when the request reached its worker; 10 at most",
        (),
        (0.25, 0.5, 0.75, 0.9, 1.0, 1.1, 1.25, 1.5, 2.0, 4.0, 10.0),
    ),
    ServerMetric(
        "ttft_prediction_error",
        "histogram",
        "Relative error of the time to the first token that was predicted at a worker; 10 at most",
        ("worker",),
        (0.05, 0.1, 0.15, 0.2, 0.3, 0.5, 0.75, 1.0, 2.0, 5.0, 10.0),
    ),
    ServerMetric(
        "ttft_unpredicted_requests",
        "counter",
        "Generations of whose first token nothing was predicted, because nothing reliable could be said",
        ("worker",),
    ),
)

_WINDOW = f"over the last {WINDOW_S:.0f} s"
WINDOW_METRICS: dict[str, tuple[str, Callable[[Counts, float], float]]] = {
    "slo_attainment": (f"Share of ended generations that met their SLO {_WINDOW}", lambda c, s: c.met / c.ended),
    "slo_attainment_strict": (
        f"Share that met it by the strict contract, token by token, {_WINDOW}",
        lambda c, s: c.strict_met / c.ended,
    ),
    "slo_goodput_rps": (f"Generations a second that met their SLO {_WINDOW}", lambda c, s: c.met / s),
}
"""Gauges by class, present once something of a class has ended: help, and the value from counts and seconds."""


_DRIFT = 0.1


def _total(name: str) -> Callable[[WorkerStatus], float | None]:
    return lambda w: None if w.load is None else w.load.counters.get(name)


WORKER_METRICS = (
    WorkerMetric("worker_ready", "gauge", "1 if the worker takes requests", lambda w: w.state is WorkerState.READY),
    WorkerMetric(
        "worker_ejected",
        "gauge",
        "1 if it is ready but gets no requests: it failed too often, or has too much to do",
        lambda w: w.ejected is not None,
    ),
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
    WorkerMetric(
        "worker_preemptions",
        "counter",
        "Sequences that were preempted: their KV blocks were given to others",
        _total("preemptions"),
    ),
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
        lambda w: None if w.load is None else float(abs(w.load.counters.get("prediction_bias", 0.0)) > _DRIFT),
    ),
    WorkerMetric(
        "worker_slow_steps", "counter", "Steps that took more than 1.6 times what was predicted", _total("slow_steps")
    ),
    WorkerMetric(
        "worker_answer_lengths", "counter", "Answers that ended of which a length was expected", _total("lengths_told")
    ),
    WorkerMetric(
        "worker_answers_within_length",
        "counter",
        "Of those, answers no longer than nine of ten were expected to be",
        _total("lengths_within"),
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
    WorkerMetric(
        "worker_resident_bytes", "gauge", "Memory of the worker's process that is in RAM", _total("resident_bytes")
    ),
    WorkerMetric("worker_gpu_clock_mhz", "gauge", "Clock of the worker's GPU", _total("gpu_clock_mhz")),
    WorkerMetric("worker_gpu_most_clock_mhz", "gauge", "Highest clock it has", _total("gpu_most_clock_mhz")),
    WorkerMetric("worker_gpu_power_watts", "gauge", "Power it takes", _total("gpu_power_w")),
    WorkerMetric("worker_gpu_temperature_celsius", "gauge", "How hot it is", _total("gpu_temperature_c")),
    WorkerMetric("worker_gpu_used_bytes", "gauge", "Memory in use on it, by all processes", _total("gpu_used_bytes")),
    WorkerMetric("worker_gpu_throttled", "gauge", "1 while power or heat hold its clock down", _total("gpu_throttled")),
)

ROUTER_METRICS = {
    "router_ledger": "Requests in flight",
    "router_held": "Requests held because no worker can take them",
}
ROUTER_COUNTERS = {
    "router_requests": ("requests", "Requests that came to the router"),
    "router_dispatches": ("dispatches", "Requests sent to a worker, repetitions included"),
    "router_redispatches": ("redispatches", "Requests sent to a second worker, the first being lost, stalled or full"),
    "router_abandoned_requests": ("requests_abandoned", "Requests whose client went away"),
    "router_failed_requests": ("requests_error", "Requests that ended with an error"),
    "router_backpressure": ("backpressure", "Requests that workers turned away because they had too much to do"),
    "router_placed_late": ("placed_late", "Requests sent to a worker although they were predicted to miss their SLO"),
    "router_refused_at_once": ("refused_at_once", "Requests refused on arrival: predicted late, as all others were"),
    "router_refused_late": ("refused_late", "Requests refused when they had waited as long as their class allows"),
    "router_faults": (
        "faults",
        "Errors of workers that count against them: five in a row and the worker is ejected for 1 to 30 s",
    ),
    "router_workers_lost": ("workers_lost", "Worker processes that ended or fell silent"),
    "router_first_tokens_predicted": ("first_tokens_predicted", "First tokens whose time the policy predicted"),
    "router_first_token_seconds": ("first_token_s", "Of those, time from dispatch to the first token"),
    "router_first_token_error_seconds": (
        "first_token_error_s",
        "Of those, by how much the prediction was off; a single one counts for no more than the time it took",
    ),
    "router_first_tokens_off_by_15_percent": ("first_tokens_off_by_15", "First tokens predicted more than 15 % off"),
    "router_first_tokens_off_by_50_percent": ("first_tokens_off_by_50", "First tokens predicted more than 50 % off"),
    "router_prefix_prompt_tokens": ("prefix_prompt_tokens", "Prompt tokens of requests whose prefix was looked up"),
    "router_prefix_predicted_tokens": ("prefix_predicted_tokens", "Of those, tokens believed to be cached there"),
    "router_prefix_hit_tokens": ("prefix_hit_tokens", "Of those, tokens that were"),
    "router_prefix_error_tokens": ("prefix_error_tokens", "Differences between the two, request by request"),
    "router_prefix_digests_lost": ("prefix_digests_lost", "Times a worker was asked for its whole digest"),
}
"""Key in `Cluster.counters` and help."""


class Metrics:
    """The metrics of one server process.

    Args:
        cluster: called at each scrape for the newest state of the workers; None if there is none.
        classes: names of the SLO classes there are; no label has other values than these, "custom" and "none".
        now: monotonic clock.
    """

    def __init__(
        self,
        cluster: Callable[[], Cluster | None],
        classes: Iterable[str] = (),
        now: Callable[[], float] = time.monotonic,
    ) -> None:
        self._registry = CollectorRegistry()
        self._registry.register(_ClusterCollector(cluster))
        self._classes, self._now = frozenset(classes), now
        self._window = SlidingWindow(now())
        self._registry.register(_WindowCollector(self._window, now))
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

    def cut_off(self, prompt_tokens: int, output_tokens: int, cached_tokens: int) -> None:
        """One generation ended before its end, after it had given these tokens."""
        self._by_name["prompt_tokens"].inc(prompt_tokens)
        self._by_name["output_tokens"].inc(output_tokens)
        self._by_name["cached_prompt_tokens"].inc(cached_tokens)

    def judged(self, output: RequestOutput, output_tokens: int) -> None:
        """The last output of a generation, with its SLO."""
        name, verdict, timings = self._class_of(output.slo_class), output.verdict, output.timings
        if verdict is None:
            ended = "unfinished" if output.finish_reason == "abort" else "finished"
            self._by_name["slo_requests"].labels(name, ended).inc()
        else:
            self._by_name["slo_requests"].labels(name, verdict.missed or "met").inc()
            self._window.add(name, verdict.met, verdict.strict_met, self._now())
            if verdict.met:
                self._by_name["slo_met_output_tokens"].labels(name).inc(output_tokens)
            if verdict.strict_met:
                self._by_name["slo_strict_met_requests"].labels(name).inc()
        if output.service is not None and output.service.unattainable:
            self._by_name["slo_unattainable_requests"].labels(name).inc()
        if timings is None or timings.ttft_s is None:
            return
        self._by_name["slo_ttft_seconds"].labels(name).observe(timings.ttft_s)
        if timings.tpot_s is not None:
            self._by_name["slo_tpot_seconds"].labels(name).observe(timings.tpot_s)
        if output.service is not None:
            self._predicted(output.service, timings.ttft_s)

    def _predicted(self, service: Service, ttft_s: float) -> None:
        """How far the prediction was off; one that was insane counts for no more than a bad one."""
        predicted_s = service.predicted_ttft_s
        if predicted_s is None or predicted_s <= 0.0 or ttft_s <= 0.0:
            self._by_name["ttft_unpredicted_requests"].labels(service.worker).inc()
            return
        self._by_name["slo_predicted_ttft_ratio"].observe(min(ttft_s / predicted_s, _MOST_OFF))
        error = min(abs(predicted_s / ttft_s - 1.0), _MOST_OFF)
        self._by_name["ttft_prediction_error"].labels(service.worker).observe(error)

    def missed(self, slo_class: str | None, missed: Missed) -> None:
        """A generation that came to no end of its own: refused, failed or unfinished."""
        name = self._class_of(slo_class)
        self._by_name["slo_requests"].labels(name, missed).inc()
        if name != NONE:
            self._window.add(name, False, False, self._now())

    def recorded(self, written: int, dropped: int) -> None:
        """Generations that were written to the trace, or left out of it. From any thread."""
        self._by_name["recorded_requests"].inc(written)
        self._by_name["unrecorded_requests"].inc(dropped)

    def _class_of(self, slo_class: str | None) -> str:
        if slo_class is None:
            return NONE
        return slo_class if slo_class in self._classes else CUSTOM

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
        for name, (key, help) in ROUTER_COUNTERS.items():
            yield CounterMetricFamily(PREFIX + name, help, value=cluster.counters.get(key, 0.0))


class _WindowCollector(Collector):
    def __init__(self, window: SlidingWindow, now: Callable[[], float]) -> None:
        self._window, self._now = window, now

    def collect(self) -> Iterator[Any]:
        now = self._now()
        totals, seconds = self._window.totals(now), self._window.length_s(now)
        for name, (help, value) in WINDOW_METRICS.items():
            family = GaugeMetricFamily(PREFIX + name, help, labels=("class",))
            for slo_class, counts in totals.items():
                family.add_metric((slo_class,), value(counts, seconds))
            yield family


def markdown() -> str:
    """docs/metrics.md."""
    rows = [(m.name, m.kind, ", ".join(m.labels), m.help) for m in SERVER_METRICS]
    rows += [(name, "gauge", "class", help) for name, (help, _) in WINDOW_METRICS.items()]
    rows += [(m.name, m.kind, "worker, device", m.help) for m in WORKER_METRICS]
    rows += [(name, "gauge", "", help) for name, help in ROUTER_METRICS.items()]
    rows += [(name, "counter", "", help) for name, (_, help) in ROUTER_COUNTERS.items()]
    lines = [
        "# Metrics",
        "",
        "`GET /metrics`, Prometheus text format. Counters carry the suffix `_total`. This page is the output of",
        "`python -m nexusengine.server.metrics`.",
        "",
        "| name | type | labels | what it is |",
        "|---|---|---|---|",
        *(f"| `{PREFIX}{name}` | {kind} | {labels} | {help} |" for name, kind, labels, help in rows),
    ]
    return "\n".join(lines) + "\n"


if __name__ == "__main__":
    print(markdown(), end="")
