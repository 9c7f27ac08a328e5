"""What server and router add to the time to first token: short prompts on devices that take no time.

    python -m benchmarks.server_cost [--rate 100] [--duration 60] [--workers 2] [--json FILE]

Two counts, both upper bounds because planning in the worker is in them: by the client's clock from sending the request,
with the client's own work (it runs on the same cores); and by the server's clock from its arrival there. To say
anything it needs a machine that does nothing else: client, server, router and workers are processes of it.
"""

from __future__ import annotations

import argparse
import json
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from nexusengine.loadgen.http import Target
from nexusengine.loadgen.items import items_of
from nexusengine.loadgen.run import offer
from nexusengine.loadgen.server import ask, own_server
from nexusengine.sim.workload.build import Builder, WorkloadSpec

LENGTHS = "lengths:input=16..64,output=8"
MOST_P50_MS, MOST_P99_MS = 2.0, 10.0


def measure(rate_rps: float, duration_s: float, workers: int, seed: int = 1) -> dict[str, Any]:
    spec = WorkloadSpec(
        trace=LENGTHS, arrivals="poisson", rate_rps=rate_rps, duration_s=duration_s, seed=seed, max_tokens=4096
    )
    items = items_of(Builder(spec).build())
    options = ["--devices", ",".join(["emulated:instant"] * workers), "--scheduler", "lens", "--router", "prism"]
    busy_before = os.getloadavg()[0]
    with own_server([*options, "--no-prefix-caching", "--nexus-verdict", "--log-level", "warning"]) as url:
        figures = offer(Target(url), items, ask(url), seed=seed).figures
    return {
        "offered": figures["offered"],
        "completed": figures["completed"],
        "rate_rps": rate_rps,
        "workers": workers,
        "load_average_before": busy_before,
        "client_ttft_ms": figures["ttft_from_sending_ms"],
        "server_ttft_ms": figures["server"]["ttft_ms"],
        "late_sending_ms": figures["late_ms"],
    }


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rate", type=float, default=100.0)
    parser.add_argument("--duration", type=float, default=60.0)
    parser.add_argument("--workers", type=int, default=2)
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--json", type=Path)
    args = parser.parse_args(argv)
    result = measure(args.rate, args.duration, args.workers, args.seed)
    print(
        f"{result['completed']} of {result['offered']} requests completed; load average before: "
        f"{result['load_average_before']:.1f}"
    )
    for name in ("server_ttft_ms", "client_ttft_ms", "late_sending_ms"):
        print(f"{name:18}" + "".join(f"{q:>8} {v:8.2f}" for q, v in result[name].items()))
    for clock in ("server", "client"):
        ttft = result[f"{clock}_ttft_ms"]
        within = ttft["p50"] < MOST_P50_MS and ttft["p99"] < MOST_P99_MS
        print(
            f"by the {clock}'s clock: {'within' if within else 'NOT within'} {MOST_P50_MS:g} ms and {MOST_P99_MS:g} ms"
        )
    if args.json:
        args.json.write_text(json.dumps(result, indent=1) + "\n")


if __name__ == "__main__":
    main()
