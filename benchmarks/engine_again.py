"""LENS as it is now beside the LENS of recorded results, at the same rates and seeds.

    python -m benchmarks.engine_again --traces ../shared/traces --before benchmarks/results/engine-2026-11-25.json
        [--devices rtxpro6000,h100] [--workloads azure,sharegpt,long,servegen,azure-2,long-2] [--seeds 101,102,103]
        [--json FILE]

At three rates of benchmarks/engine.py: LENS' recorded goodput, 1.3 times that of the best static policy, and half of
it. Shown are attainment (longest tenth) before and now, and at half load p99 TTFT and TPOT over the recorded ones of
FCFS with 2,048 tokens, before and now. The default takes about half an hour on one core that nobody else uses.
"""

from __future__ import annotations

import argparse
import json
import tempfile
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks.engine import Bench, Task, run

STAGES = (("ablation", "lens"), ("overload", "lens"), ("light", "lens@0.5"))
WORKLOADS = ("azure", "sharegpt", "long", "servegen", "azure-2", "long-2")


def p99(result: dict[str, Any], key: str) -> float:
    return float(np.mean([values["p99"] for values in result[key]]))


def line(now: dict[str, Any], before: dict[str, Any], fcfs: dict[str, Any] | None) -> str:
    """Before and now; fcfs: its results, to set the tails of latency beside."""
    cells = (f"{m['attainment']:.4f} ({m['attainment_longest_decile']:.2f})" for m in (before, now))
    text = " -> ".join(cells)
    if fcfs is not None:
        for key in ("ttft_ms", "tpot_ms"):
            ratios = (p99(m, key) / p99(fcfs, key) for m in (before, now))
            text += f"  p99 {key[:4].upper()} over FCFS 2048 " + " -> ".join(f"{r:.3f}" for r in ratios)
    return text


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--traces", type=Path, required=True, help="folder of the traces")
    parser.add_argument("--before", type=Path, required=True, help="results of benchmarks/engine.py")
    parser.add_argument("--devices", type=lambda text: text.split(","), default=["rtxpro6000", "h100"])
    parser.add_argument("--workloads", type=lambda text: text.split(","), default=list(WORKLOADS))
    parser.add_argument("--seeds", type=lambda text: tuple(map(int, text.split(","))), default=(101, 102, 103))
    parser.add_argument("--json", type=Path, default=Path("engine-again.json"), help="results, written anew")
    parser.set_defaults(duration=None)
    args = parser.parse_args()
    args.json.unlink(missing_ok=True)
    recorded = json.loads(args.before.read_text())
    results: dict[str, Any] = {}
    with tempfile.TemporaryDirectory() as folder:
        bench = Bench(args, Path(folder))
        for device in args.devices:
            for workload in args.workloads:
                for stage, label in STAGES:
                    key = (stage, device, workload, label)
                    before = recorded.get("|".join(key))
                    if before is None:
                        continue
                    now = run(Task(key, bench.spec(device, workload, "lens"), args.seeds, before["rate_rps"]))
                    results["|".join(key)] = now
                    fcfs = recorded.get("|".join((*key[:3], "fcfs:budget=2048@0.5"))) if stage == "light" else None
                    print(f"{device:11} {workload:14} {stage:9} {line(now, before, fcfs)}", flush=True)
    args.json.write_text(json.dumps(results, indent=0) + "\n")


if __name__ == "__main__":
    main()
