"""What placing a request costs, in microseconds: the policy alone, and all that RouterCore does for a request.

Workers hold `pending` prompts each, more than they can serve in time, and every request falls among them; so every
queue is rolled forward. Reports come between requests at the rate of a live cluster, and are digested as the broker
has it done: when they have come, before the next request. What that costs is a column of its own.

    python -m benchmarks.place_cost [--policies prism,least-requests] [--workers 8,64] [--json out.json]

The same requests are placed anew `--repeats` times. Median, mean and 99th percentile are over requests, each with its
fastest repeat, which leaves out what other processes on the machine take.
"""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from nexusengine import wire
from nexusengine.perf import basis, online
from nexusengine.perf.curve import Curve
from nexusengine.router.core import RouterCore
from nexusengine.router.placement.policy import Decision, PlacementPolicy, PlacementRequest, WorkerView
from nexusengine.router.placement.registry import make_policy
from nexusengine.types import SLO, EngineRequest, SamplingParams
from nexusengine.wire import identity_of

Seconds = npt.NDArray[np.float64]
_CLIENT = b"client"
_EPOCH = "e"
_STEP_S, _CHUNK_S = 0.006, (0.003, 0.02)  # of a step, and of 100 tokens in it, in the slowest and quickest worker


def perf(rng: np.random.Generator) -> wire.PerfSnapshot:
    """Of a device somewhere between the quickest and the slowest."""
    weights = [0.0] * basis.TERMS
    terms = (basis.ONE, basis.SLOPE, basis.ATTENTION, basis.KV)
    for term, seconds in zip(terms, (_STEP_S, float(rng.uniform(*_CHUNK_S)), 0.002, 0.001), strict=True):
        weights[term] = seconds
    return wire.PerfSnapshot(online.KIND, Curve(weights, 8192.0, 1.1, 1.1).numbers, 1.1, 1000, 0)


def load(rng: np.random.Generator, pending: int, last_dispatch_seq: int, now: float) -> wire.WorkerLoad:
    """A busy worker's report, its pending prompts due over the next two seconds."""
    due = np.sort(now + rng.uniform(0.05, 2.0, pending)).tolist()
    left = rng.integers(100, 2000, pending).tolist()
    prompts = tuple(wire.PendingPrefill(d, n, 0, 0.05, False) for d, n in zip(due, left, strict=True))
    return wire.WorkerLoad(
        last_dispatch_seq=last_dispatch_seq,
        running=64 + pending,
        kv_used_blocks=8000,
        kv_total_blocks=30_000,
        decodes=64,
        decode_kv_tokens=64_000,
        tightest_tpot_s=0.05,
        pending=prompts,
        pending_tokens=sum(left),
        mean_output_tokens=200.0,
        perf=perf(rng),
    )


class Stopwatch:
    """A policy whose calls of `place` are timed."""

    def __init__(self, policy: PlacementPolicy) -> None:
        self._policy, self.name, self.uses_prefixes = policy, policy.name, policy.uses_prefixes
        self.took_s: list[float] = []

    def prepare(self, workers: Sequence[WorkerView], now: float) -> None:
        self._policy.prepare(workers, now)

    def observe(self, in_time: bool) -> None:
        self._policy.observe(in_time)

    def saturated(self, now: float) -> bool:
        return self._policy.saturated(now)

    def place(self, request: PlacementRequest, workers: Sequence[WorkerView], now: float) -> Decision:
        began_s = time.perf_counter()
        decision = self._policy.place(request, workers, now)
        self.took_s.append(time.perf_counter() - began_s)
        return decision


def place_all(name: str, workers: int, pending: int, requests: int, reports: float) -> tuple[Seconds, Seconds, Seconds]:
    """Seconds of the policy and of all the router does, by request, and of the reports before each; the same requests
    every time. reports: of all workers between two requests."""
    rng = np.random.default_rng(1)
    infos = [
        wire.WorkerInfo(f"w{i}", _EPOCH, 1, "cpu", "m", max_model_len=32_768, max_batch_tokens=2048, block_size=16)
        for i in range(workers)
    ]
    policy = Stopwatch(make_policy(name))
    core = RouterCore(policy, infos, epoch="r")
    now, seq, owed = 0.0, 0, 0.0
    for info in infos:
        core.on_worker(identity_of(info.worker_id, _EPOCH), wire.Ready(info), now)
        core.on_worker(identity_of(info.worker_id, _EPOCH), wire.Report(0, load(rng, pending, 0, now)), now)
    sampling = SamplingParams(seed=1, max_tokens=200)
    router_s, digest_s = np.zeros(requests), np.zeros(requests)
    for n in range(requests):
        now += 0.001
        owed += reports
        came = owed >= 1.0
        while owed >= 1.0:
            owed, seq = owed - 1.0, seq + 1
            info = infos[seq % workers]
            worker = core.workers.by_id[info.worker_id]
            report = wire.Report(seq, load(rng, pending, worker.dispatch_seq, now))
            began_s = time.perf_counter()
            core.on_worker(identity_of(info.worker_id, _EPOCH), report, now)
            digest_s[n] += time.perf_counter() - began_s
        if came:
            began_s = time.perf_counter()
            core.prepare(now)
            digest_s[n] += time.perf_counter() - began_s
        prompt = [1] * int(rng.integers(50, 2000))
        request = EngineRequest(f"r{n}", prompt, sampling, now, slo=SLO(0.5 + 0.001 * len(prompt), 0.05))
        began_s = time.perf_counter()
        core.on_client(_CLIENT, wire.Submit(request), now)
        router_s[n] = time.perf_counter() - began_s
        core.take()
    if len(policy.took_s) != requests:
        raise RuntimeError(f"{name} was asked {len(policy.took_s)} times for {requests} requests")
    return np.array(policy.took_s), router_s, digest_s


def measure(name: str, workers: int, pending: int, requests: int, reports: float, repeats: int) -> dict[str, Any]:
    """In microseconds, over the second half of the requests: queues have settled by then."""
    runs = [place_all(name, workers, pending, requests, reports) for _ in range(repeats)]
    policy_s, router_s, digest_s = (np.min(taken, axis=0)[requests // 2 :] for taken in zip(*runs, strict=True))
    result: dict[str, Any] = {"policy": name, "workers": workers, "pending": pending, "repeats": repeats}
    for what, taken_s in (("policy", policy_s), ("router", router_s)):
        us = 1e6 * taken_s
        result |= {f"{what}_p50_us": float(np.median(us)), f"{what}_p99_us": float(np.percentile(us, 99))}
        result[f"{what}_mean_us"] = float(us.mean())
    result["report_mean_us"] = 1e6 * float(digest_s.sum()) / (reports * len(digest_s))
    return result


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--policies", default="prism,paper-prism,least-requests,lmetric")
    parser.add_argument("--workers", default="8,64")
    parser.add_argument("--pending", type=int, default=64)
    parser.add_argument("--requests", type=int, default=1000)
    parser.add_argument(
        "--reports",
        type=float,
        default=0.1,
        help="reports of each worker between two requests; 0.1: reports every 100 ms, 100 requests/s",
    )
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--json", type=Path)
    args = parser.parse_args(argv)
    results = []
    head = (
        "policy",
        "workers",
        *(f"{w} {k}" for w in ("policy", "router") for k in ("p50", "mean", "p99")),
        "a report",
    )
    print("  ".join(f"{h:>12}" for h in head) + "  (us)")
    for name in args.policies.split(","):
        for workers in map(int, args.workers.split(",")):
            r = measure(name, workers, args.pending, args.requests, args.reports * workers, args.repeats)
            results.append(r)
            cells = [r[f"{w}_{k}_us"] for w in ("policy", "router") for k in ("p50", "mean", "p99")]
            print("  ".join([f"{name:>12}", f"{workers:>12}", *(f"{c:>12.0f}" for c in (*cells, r["report_mean_us"]))]))
    if args.json:
        args.json.write_text(json.dumps(results, indent=1) + "\n")


if __name__ == "__main__":
    main()
