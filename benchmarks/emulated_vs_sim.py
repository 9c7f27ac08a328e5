"""The same workload on emulated devices over HTTP and in the simulator: how far are they apart, and why?

    python -m benchmarks.emulated_vs_sim --trace ../shared/traces/azure2023_conv.csv.gz --arrivals poisson --rate 6
        [--devices rtxpro6000,rtx4090] [--duration 180] [--classes mixed] [--engine lens] [--router prism] [--json FILE]

Both sides see the same requests at the same instants, made by one seed, and judge them by the same contract; the client
is an open loop. Step times scatter independently on both sides. Two simulations are shown: one of workers that lose no
time between steps, and one that charges each step what the workers of the emulated run were seen to lose: the time from
the beginning of a step to the beginning of the next less the device's own, from /debug/steps at two thirds of the run.
"""

from __future__ import annotations

import argparse
import json
import os
import time
import urllib.request
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from itertools import pairwise
from pathlib import Path
from statistics import fmean
from typing import Any

from nexusengine.loadgen.http import Target
from nexusengine.loadgen.items import items_of
from nexusengine.loadgen.run import offer
from nexusengine.loadgen.server import ask, own_server
from nexusengine.sim.api import SimSpec, parse_devices, simulate
from nexusengine.sim.workload.build import Builder
from nexusengine.wire import MAX_STEPS_IN_REPLY

IDLE_MS = 200.0  # a worker that begins no step for so long had no work
MOST_ATTAINMENT_POINTS, MOST_MEDIAN_PERCENT = 3.0, 10.0


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--trace", required=True)
    parser.add_argument("--arrivals", default="poisson")
    parser.add_argument("--rate", type=float, required=True)
    parser.add_argument("--duration", type=float, default=180.0)
    parser.add_argument("--devices", default="rtxpro6000,rtx4090")
    parser.add_argument("--classes", default="mixed")
    parser.add_argument("--engine", default="lens")
    parser.add_argument("--router", default="prism")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--json", metavar="FILE")
    args = parser.parse_args()

    spec = SimSpec(
        trace=args.trace,
        devices=args.devices,
        arrivals=args.arrivals,
        rate_rps=args.rate,
        duration_s=args.duration,
        engine=args.engine,
        router=args.router,
        classes=args.classes,
        seed=args.seed,
        stated_limit="exact",  # as the client does
    )
    busy_before = os.getloadavg()[0]
    emulated, max_model_len, host = run_emulated(spec)
    spec = replace(spec, max_model_len=max_model_len)
    ideal = simulate(spec).metrics
    charged = simulate(replace(spec, scheduler_cost_s=host.between_s)).metrics
    result = {
        "load_average": [busy_before, os.getloadavg()[0]],
        "between_steps_ms": 1e3 * host.between_s,
        "of_it_scheduler_ms": 1e3 * host.scheduler_s,
        "emulated": emulated,
        "simulated": ideal,
        "simulated_with_host_time": charged,
        "off": off_by(emulated, charged),
        "off_ideal": off_by(emulated, ideal),
    }
    if args.json:
        Path(args.json).write_text(json.dumps(result, indent=1) + "\n")
    show(result)


@dataclass(frozen=True, slots=True)
class Host:
    """Means over steps. between_s: from the end of a step on the device to the beginning of the next, in a worker that
    had work all the time; scheduler_s: of it, planning and bookkeeping as the worker counts it."""

    between_s: float
    scheduler_s: float


def run_emulated(spec: SimSpec) -> tuple[dict[str, Any], int, Host]:
    """Figures of the client, the server's longest sequence, and what its workers lose between steps."""
    options = ["--devices", ",".join(f"emulated:{d}" for d in parse_devices(spec.devices))]
    options += ["--scheduler", spec.engine, "--router", spec.router, "--seed", str(spec.seed)]
    options += ["--max-batch-tokens", str(spec.max_batch_tokens), "--max-running", str(spec.max_running)]
    options += ["--no-prefix-caching", "--snapshot-period", str(spec.snapshot_period_s), "--log-level", "warning"]
    with own_server([*options, "--debug-endpoints"]) as url, ThreadPoolExecutor(1) as pool:
        info = ask(url)
        assert info.max_model_len is not None
        workload = Builder(spec.workload(info.max_model_len)).build()
        host = pool.submit(look_at_steps, url, 2 / 3 * workload.duration_s)
        figures = offer(Target(url), items_of(workload), info, seed=spec.seed, timeout_s=spec.request_timeout_s).figures
        return figures, info.max_model_len, host.result()


def look_at_steps(url: str, after_s: float) -> Host:
    time.sleep(after_s)
    with urllib.request.urlopen(f"{url}/debug/steps?last={MAX_STEPS_IN_REPLY}", timeout=30) as reply:
        workers = json.load(reply)["workers"]
    between_ms, scheduler_ms = [], []
    for steps in workers.values():
        for one, following in pairwise(steps):
            gap_ms = one["age_ms"] - following["age_ms"] - one["device_ms"]
            if gap_ms < IDLE_MS:
                between_ms.append(gap_ms)
                scheduler_ms.append(one["scheduler_ms"])
    return Host(fmean(between_ms) / 1e3, fmean(scheduler_ms) / 1e3)


def off_by(emulated: dict[str, Any], simulated: dict[str, Any]) -> dict[str, float]:
    """Emulated less simulated: points of attainment, and percent of medians."""

    def percent(key: str) -> float:
        return float(100.0 * (emulated[key]["p50"] / simulated[key]["p50"] - 1.0))

    return {
        "attainment_points": 100.0 * (emulated["attainment"] - simulated["attainment"]),
        "ttft_p50_percent": percent("ttft_ms"),
        "tpot_p50_percent": percent("tpot_ms"),
        "e2e_p50_percent": percent("e2e_ms"),
    }


def show(result: dict[str, Any]) -> None:
    columns = ("emulated", "simulated", "simulated_with_host_time")
    shares = ("offered", "completed", "attainment", "attainment_strict", "attainment_longest_decile")
    rows: list[tuple[str, list[float | None]]] = [(key, [result[c][key] for c in columns]) for key in shares]
    for key in ("ttft_ms", "tpot_ms", "e2e_ms"):
        rows += [(f"{key} {q}", [result[c][key][q] for c in columns]) for q in ("mean", "p50", "p90", "p99")]
    server = result["emulated"]["server"]
    if server is not None:
        rows += [(f"{k} p50 by the server's clock", [server[k]["p50"], None, None]) for k in ("ttft_ms", "tpot_ms")]
    print(f"{'':34}{'emulated':>12}{'simulated':>12}{'with host':>12}")
    for name, values in rows:
        print(f"{name:34}" + "".join(f"{'' if v is None else format(v, '.4g'):>12}" for v in values))
    print(f"late sending p99 {result['emulated']['late_ms']['p99']:.2f} ms; load average {result['load_average']}")
    print(
        f"between steps {result['between_steps_ms']:.2f} ms, charged in the last column; of it planning and bookkeeping"
        f" {result['of_it_scheduler_ms']:.2f} ms"
    )
    for name, off in (("with host time", result["off"]), ("ideal", result["off_ideal"])):
        within = (
            abs(off["attainment_points"]) <= MOST_ATTAINMENT_POINTS
            and abs(off["ttft_p50_percent"]) <= MOST_MEDIAN_PERCENT
            and abs(off["tpot_p50_percent"]) <= MOST_MEDIAN_PERCENT
        )
        print(
            f"emulated against simulated ({name}): {off['attainment_points']:+.1f} points of attainment, medians: TTFT "
            f"{off['ttft_p50_percent']:+.1f} %, TPOT {off['tpot_p50_percent']:+.1f} %: "
            f"{'within' if within else 'NOT within'} 3 points and 10 %"
        )


if __name__ == "__main__":
    main()
