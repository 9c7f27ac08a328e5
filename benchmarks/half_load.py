"""Half load: what a policy between FCFS and LENS gains in tail latency, and which promises it breaks for that.

    python -m benchmarks.half_load --traces ../shared/traces --json FILE [--plot FILE.png] [--seeds 1-3]
        [--cases rtxpro6000:long:0.4734,h100:long:1.4176] [--policies ...]

Simulated. For each case (device, workload of benchmarks/engine_workloads.py, requests a second) every policy serves the
same requests. Shown are the share of promises broken, and the 99th percentiles of TTFT and TPOT over those of FCFS
with 2,048 tokens. The plot sets the one against the others: a policy further down and left is better in both.
"""

from __future__ import annotations

import argparse
import json
import tempfile
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks.engine_workloads import WORKLOADS
from nexusengine.sim.api import SimSpec, simulate

REFERENCE = "fcfs:budget=2048"
POLICIES = (
    REFERENCE,
    "fcfs:budget=512",
    "fcfs:budget=8192",
    "edf:budget=2048",
    "lens:limit=0,budget=2048",
    "lens:order=0",
    "lens:coalescing=0",
    "lens",
)
"""Between the two: LENS's order with FCFS's steps (limit=0), and LENS's steps with FCFS's order (order=0)."""
CASES = (("rtxpro6000", "long", 0.4734), ("h100", "long", 1.4176), ("rtxpro6000", "azure", 4.255))


def measure(spec: SimSpec, seeds: tuple[int, ...]) -> dict[str, float]:
    """Means over seeds."""
    found = []
    for seed in seeds:
        m = simulate(replace(spec, seed=seed)).metrics
        found.append(
            {
                "broken": 1.0 - m["attainment"],
                "broken_longest": 1.0 - m["attainment_longest_decile"],
                "ttft_p50_ms": m["ttft_ms"]["p50"],
                "ttft_p99_ms": m["ttft_ms"]["p99"],
                "tpot_p99_ms": m["tpot_ms"]["p99"],
            }
        )
    return {key: float(np.mean([f[key] for f in found])) for key in found[0]}


def plot(rows: list[dict[str, Any]], path: Path) -> None:
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    cases = list(dict.fromkeys((r["device"], r["workload"]) for r in rows))
    figure, axes = pyplot.subplots(2, len(cases), figsize=(4.2 * len(cases), 7), squeeze=False)
    for column, case in enumerate(cases):
        for row, key in enumerate(("ttft_p99_ratio", "tpot_p99_ratio")):
            axis = axes[row][column]
            for r in rows:
                if (r["device"], r["workload"]) == case:
                    axis.plot(100 * r["broken"], r[key], marker="o", linestyle="")
                    axis.annotate(r["policy"], (100 * r["broken"], r[key]), fontsize=6)
            axis.axhline(1.05, color="0.6", linewidth=0.8, linestyle="--")
            axis.set_xlabel("promises broken, %")
            axis.set_ylabel(f"p99 of {key[:4].upper()} over {REFERENCE}")
            axis.set_title(f"{case[1]} on {case[0]}", fontsize=10)
    figure.tight_layout()
    figure.savefig(path, dpi=120)


def _case(text: str) -> tuple[str, str, float]:
    device, workload, rate = text.split(":")
    return device, workload, float(rate)


def _numbers(text: str) -> tuple[int, ...]:
    first, _, last = text.partition("-")
    return tuple(range(int(first), int(last or first) + 1))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--traces", type=Path, required=True, help="folder of the traces")
    parser.add_argument("--json", type=Path)
    parser.add_argument("--plot", type=Path)
    parser.add_argument("--cases", type=lambda text: [_case(c) for c in text.split(",")], default=list(CASES))
    parser.add_argument("--policies", type=lambda text: text.split(";"), default=list(POLICIES))
    parser.add_argument("--seeds", type=_numbers, default=(1, 2, 3), help="FIRST-LAST")
    args = parser.parse_args()
    rows: list[dict[str, Any]] = []
    with tempfile.TemporaryDirectory() as folder:
        for device, workload, rate_rps in args.cases:
            w = WORKLOADS[workload]
            path = w.make(args.traces, Path(folder))
            first: dict[str, float] = {}
            for policy in args.policies:
                spec = SimSpec(
                    trace=str(path),
                    devices=device,
                    arrivals=w.arrivals,
                    classes=w.classes,
                    duration_s=w.duration_s,
                    rate_rps=rate_rps,
                    engine=policy,
                    max_batch_tokens=8192,
                )
                found = measure(spec, args.seeds)
                first = first or found
                found |= {f"{k}_p99_ratio": found[f"{k}_p99_ms"] / first[f"{k}_p99_ms"] for k in ("ttft", "tpot")}
                rows.append({"device": device, "workload": workload, "rate_rps": rate_rps, "policy": policy, **found})
                print(
                    f"{device:11} {workload:9} {policy:26} broken {100 * found['broken']:5.1f} %  longest tenth "
                    f"{100 * found['broken_longest']:5.1f} %  p99 TTFT {found['ttft_p99_ratio']:.3f}  "
                    f"TPOT {found['tpot_p99_ratio']:.3f}",
                    flush=True,
                )
    if args.json:
        args.json.write_text(json.dumps(rows, indent=1) + "\n")
    if args.plot:
        plot(rows, args.plot)


if __name__ == "__main__":
    main()
