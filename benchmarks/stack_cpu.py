"""Processor time of server, router and workers for each token and each request that passes through them.

    python -m benchmarks.stack_cpu [--devices emulated:h100] [--rate 20] [--outputs 8,200] [--duration 20] [--json FILE]

Short prompts as token ids over HTTP, streamed. Each run has answers of another length; what a longer answer costs more
is the cost of its tokens, and the rest that of the request. An emulated device computes nothing, so a worker's time is
that of planning, bookkeeping and messages. The client's own time is shown beside: it has the same cores.
"""

from __future__ import annotations

import argparse
import json
import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import psutil

from nexusengine.loadgen.http import Target
from nexusengine.loadgen.items import items_of
from nexusengine.loadgen.run import offer
from nexusengine.loadgen.server import ServerInfo, ask, own_server
from nexusengine.sim.workload.build import Builder, WorkloadSpec

ROLES = {
    "nexusengine.router.broker": "router",
    "nexusengine.server.main": "server",
    "nexusengine.worker.worker": "workers",
}


@dataclass(frozen=True, slots=True)
class ProcessTimes:
    """Seconds of processor time so far, user and system, by role; the client is this process."""

    by_role: dict[str, float]

    @classmethod
    def now(cls) -> ProcessTimes:
        own = os.times()
        times = dict.fromkeys(ROLES.values(), 0.0) | {"client": own.user + own.system}
        for process in psutil.Process().children(recursive=True):
            words = process.cmdline()
            role = next((role for module, role in ROLES.items() if module in words), None)
            if role is not None:
                used = process.cpu_times()
                times[role] += used.user + used.system
        return cls(times)

    def since(self, before: ProcessTimes) -> dict[str, float]:
        return {role: at - before.by_role[role] for role, at in self.by_role.items()}


def one(url: str, info: ServerInfo, args: argparse.Namespace, outputs: int) -> dict[str, Any]:
    """Processor seconds by role of one run, and how many requests and tokens it had."""
    spec = WorkloadSpec(
        trace=f"lengths:input=20..100,output={outputs}",
        arrivals="poisson",
        rate_rps=args.rate,
        duration_s=args.duration,
        classes=args.classes,
        seed=args.seed,
        max_tokens=4096,
    )
    before = ProcessTimes.now()
    records = offer(Target(url), items_of(Builder(spec).build()), info, seed=args.seed, timeout_s=120.0).records
    seconds = ProcessTimes.now().since(before)
    return {
        "outputs": outputs,
        "requests": len(records),
        "completed": sum(r.completed for r in records),
        "tokens": sum(r.output_tokens for r in records),
        "events": sum(r.events for r in records),
        "seconds": seconds,
    }


def costs_of(runs: list[dict[str, Any]]) -> dict[str, dict[str, float]]:
    """By role, microseconds a request and a token: the plane through the runs with least squares."""
    counts = np.array([[run["requests"], run["tokens"]] for run in runs], float)
    costs = {}
    for role in runs[0]["seconds"]:
        solved = np.linalg.lstsq(counts, np.array([run["seconds"][role] for run in runs]), rcond=None)[0]
        costs[role] = {"request_us": 1e6 * float(solved[0]), "token_us": 1e6 * float(solved[1])}
    return costs


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--devices", default="emulated:h100")
    parser.add_argument("--rate", type=float, default=20.0)
    parser.add_argument("--outputs", default="8,200", help="lengths of answers, one run each")
    parser.add_argument("--duration", type=float, default=20.0)
    parser.add_argument("--classes", default="interactive")
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--json", type=Path)
    args = parser.parse_args()
    options = ["--devices", args.devices, "--no-prefix-caching", "--log-level", "warning"]
    busy = [os.getloadavg()[0]]
    with own_server(options) as url:
        info = ask(url)
        one(url, info, argparse.Namespace(**vars(args) | {"duration": 3.0}), 8)  # warms up
        runs = [one(url, info, args, int(outputs)) for outputs in args.outputs.split(",")]
    busy.append(os.getloadavg()[0])
    costs = costs_of(runs)
    for run in runs:
        print(
            f"{run['outputs']} tokens an answer: {run['completed']} of {run['requests']} answers, {run['tokens']}"
            f" tokens in {run['events']} events; "
            + ", ".join(f"{role} {seconds:.2f} s" for role, seconds in run["seconds"].items())
        )
    print(f"{'processor time, us':20}{'a request':>12}{'a token':>12}")
    for role, cost in costs.items():
        print(f"{role:20}{cost['request_us']:>12.0f}{cost['token_us']:>12.1f}")
    if args.json:
        options_ = {key: str(value) for key, value in vars(args).items()}
        result = {"options": options_, "load_average": busy, "runs": runs, "costs_us": costs}
        args.json.write_text(json.dumps(result, indent=1) + "\n")


if __name__ == "__main__":
    main()
