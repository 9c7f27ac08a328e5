"""The same workload on emulated devices over HTTP and in the simulator: how far are they apart, and why?

    python -m benchmarks.emulated_vs_sim --trace ../shared/traces/azure2023_conv.csv.gz --arrivals poisson --rate 6
        [--devices rtxpro6000,rtx4090] [--duration 180] [--classes mixed] [--engine lens] [--router prism] [--json FILE]

Both sides see the same requests at the same instants, made by one seed, and judge them by the same contract; the client
is an open loop. Step times scatter independently on both sides. Two simulations are shown: one of ideal schedulers, and
one that charges each step what the workers of the emulated run say that planning and bookkeeping took them (their
counters nexusengine_worker_scheduler_seconds and _steps), which is what a real worker adds to each step of its device.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import urllib.request
from dataclasses import replace
from pathlib import Path
from typing import Any

from nexusengine.loadgen.http import Target
from nexusengine.loadgen.items import items_of
from nexusengine.loadgen.run import offer
from nexusengine.loadgen.server import ask, own_server
from nexusengine.sim.api import SimSpec, parse_devices, simulate
from nexusengine.sim.workload.build import Builder

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
    emulated, max_model_len, step_cost_s = run_emulated(spec)
    spec = replace(spec, max_model_len=max_model_len)
    ideal = simulate(spec).metrics
    charged = simulate(replace(spec, scheduler_cost_s=step_cost_s)).metrics
    result = {
        "load_average": [busy_before, os.getloadavg()[0]],
        "scheduler_ms_per_step": 1e3 * step_cost_s,
        "emulated": emulated,
        "simulated": ideal,
        "simulated_with_scheduler_cost": charged,
        "off": off_by(emulated, charged),
        "off_ideal": off_by(emulated, ideal),
    }
    if args.json:
        Path(args.json).write_text(json.dumps(result, indent=1) + "\n")
    show(result)


def run_emulated(spec: SimSpec) -> tuple[dict[str, Any], int, float]:
    """Figures of the client, longest sequence of the server, and its workers' CPU seconds a step outside the device."""
    options = ["--devices", ",".join(f"emulated:{d}" for d in parse_devices(spec.devices))]
    options += ["--scheduler", spec.engine, "--router", spec.router, "--seed", str(spec.seed)]
    options += ["--max-batch-tokens", str(spec.max_batch_tokens), "--max-running", str(spec.max_running)]
    options += ["--no-prefix-caching", "--snapshot-period", str(spec.snapshot_period_s), "--log-level", "warning"]
    with own_server(options) as url:
        info = ask(url)
        assert info.max_model_len is not None
        items = items_of(Builder(spec.workload(info.max_model_len)).build())
        before = counters(url)
        figures = offer(Target(url), items, info, seed=spec.seed, timeout_s=spec.request_timeout_s).figures
        after = counters(url)
    steps = after["worker_steps"] - before["worker_steps"]
    cost_s = (after["worker_scheduler_seconds"] - before["worker_scheduler_seconds"]) / steps
    return figures, info.max_model_len, cost_s


def counters(url: str) -> dict[str, float]:
    """Sums over workers."""
    with urllib.request.urlopen(f"{url}/metrics", timeout=10) as reply:
        text = reply.read().decode()
    sums: dict[str, float] = {}
    for name, value in re.findall(
        r"^nexusengine_(worker_(?:scheduler_seconds|steps))_total\{[^}]*\} (\S+)$", text, re.M
    ):
        sums[name] = sums.get(name, 0.0) + float(value)
    return sums


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
    columns = ("emulated", "simulated", "simulated_with_scheduler_cost")
    shares = ("offered", "completed", "attainment", "attainment_strict", "attainment_longest_decile")
    rows: list[tuple[str, list[float | None]]] = [(key, [result[c][key] for c in columns]) for key in shares]
    for key in ("ttft_ms", "tpot_ms", "e2e_ms"):
        rows += [(f"{key} {q}", [result[c][key][q] for c in columns]) for q in ("mean", "p50", "p90", "p99")]
    server = result["emulated"]["server"]
    if server is not None:
        rows += [(f"{k} p50 by the server's clock", [server[k]["p50"], None, None]) for k in ("ttft_ms", "tpot_ms")]
    print(f"{'':34}{'emulated':>12}{'simulated':>12}{'with cost':>12}")
    for name, values in rows:
        print(f"{name:34}" + "".join(f"{'' if v is None else format(v, '.4g'):>12}" for v in values))
    print(f"late sending p99 {result['emulated']['late_ms']['p99']:.2f} ms; load average {result['load_average']}")
    print(f"planning and bookkeeping {result['scheduler_ms_per_step']:.3f} ms a step, charged in the last column")
    for name, off in (("with cost", result["off"]), ("ideal", result["off_ideal"])):
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
