"""This box under rising load: the server started with each pair of policies, and a trace replayed at rising rates.

    scripts/bench.sh [--model llama-3-8b] [--devices auto] [--systems lens/prism,fcfs/round-robin]
        [--trace FILE | --lengths input=...,output=...] [--classes mixed] [--rates 2,4,8 | --first-rate 2]
        [--duration 60] [--out benchmarks/results/box]

Every system sees the same requests at the same instants. Without --rates the rate doubles from --first-rate until the
first system keeps fewer than half of its promises; the others get the same rates. Writes OUT.json and, where matplotlib
is installed, OUT.png. On a box without GPUs the devices are emulated ones, and every line of the output says so.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from nexusengine.config import count_cuda_devices
from nexusengine.loadgen.http import Target
from nexusengine.loadgen.items import items_of
from nexusengine.loadgen.run import offer
from nexusengine.loadgen.server import ask, own_server
from nexusengine.sim.workload.build import Builder, WorkloadSpec

EMULATED = "emulated:h100,emulated:a100,emulated:a100,emulated:l4,emulated:l4"
LENGTHS = "input=logn:600:2500,output=logn:120:400"
_HALF = 0.5
_MOST_RATES = 10
_USUAL_MODEL_LEN = 4096


def run_system(args: argparse.Namespace, system: str, rates: list[float] | None, label: str) -> list[dict[str, Any]]:
    """Rows of one pair of policies, a row a rate. rates None: doubling."""
    engine, _, router = system.partition("/")
    options = ["--devices", args.devices, "--scheduler", engine, "--router", router]
    if args.model:
        options += ["--model", args.model]
    if args.classes.endswith(".toml"):
        options += ["--slo-classes", args.classes]
    rows: list[dict[str, Any]] = []
    with own_server(options + args.serve) as url:
        info = ask(url)
        rate = args.first_rate
        for n in range(len(rates) if rates is not None else _MOST_RATES):
            rate = rates[n] if rates is not None else args.first_rate * 2**n
            spec = WorkloadSpec(
                trace=args.trace or f"lengths:{args.lengths}",
                arrivals=args.arrivals,
                rate_rps=rate,
                duration_s=args.duration,
                classes=args.classes,
                seed=args.seed,
                max_tokens=info.max_model_len or _USUAL_MODEL_LEN,
                scale=args.scale,
            )
            figures = offer(Target(url, None), items_of(Builder(spec).build()), info, seed=args.seed).figures
            rows.append({"system": system, "devices": label, "rate_rps": rate, **figures})
            print(line(rows[-1]), flush=True)
            if rates is None and figures["attainment"] < _HALF:
                break
    return rows


HEAD = f"{'system':<24}{'devices':<34}{'rate/s':>8}{'in time':>9}{'TTFT p50':>10}{'p99':>9}{'TPOT':>10}{'tokens/s':>10}"


def line(row: dict[str, Any]) -> str:
    ttft, tpot = row["ttft_ms"], row["tpot_ms"]
    cells = (ttft["p50"], ttft["p99"], tpot["p50"], row["output_tokens_per_s"])
    return (
        f"{row['system']:<24}{row['devices'][:32]:<34}{row['rate_rps']:>8.3g}{100 * row['attainment']:>8.1f}%"
        f"{_ms(cells[0]):>10}{_ms(cells[1]):>9}{_ms(cells[2]):>10}{_ms(cells[3]):>10}"
    )


def _ms(value: float | None) -> str:
    return "-" if value is None else f"{value:.0f}"


def plot(rows: list[dict[str, Any]], path: Path) -> None:
    """Attainment, median TTFT and throughput against the offered rate, a line a system."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(14, 4.4), layout="constrained")
    axes = figure.subplots(1, 3)
    wanted: tuple[tuple[str, Callable[[dict[str, Any]], float]], ...] = (
        ("promises kept (%)", lambda r: 100 * r["attainment"]),
        ("median TTFT (ms)", lambda r: r["ttft_ms"]["p50"]),
        ("output tokens/s", lambda r: r["output_tokens_per_s"]),
    )
    for axis, (label, value) in zip(axes, wanted, strict=True):
        for system in dict.fromkeys(r["system"] for r in rows):
            mine = [r for r in rows if r["system"] == system]
            axis.plot([r["rate_rps"] for r in mine], [value(r) for r in mine], marker="o", label=system)
        axis.set_xlabel("offered requests/s")
        axis.set_ylabel(label)
        axis.set_ylim(bottom=0)
        axis.grid(color="0.9")
    axes[1].set_yscale("log")
    axes[0].legend(frameon=False)
    figure.suptitle(rows[0]["devices"])
    figure.savefig(path, dpi=120)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", help="as of nexusengine serve")
    parser.add_argument(
        "--devices", default="auto", help="as of nexusengine serve; auto: every GPU, else emulated ones"
    )
    parser.add_argument("--systems", default="lens/prism,fcfs/round-robin", help="ENGINE/ROUTER,...")
    parser.add_argument("--trace", help="CSV or JSONL with lengths and arrivals")
    parser.add_argument("--lengths", default=LENGTHS)
    parser.add_argument("--arrivals", default="poisson")
    parser.add_argument("--classes", default="mixed")
    parser.add_argument("--rates", help="requests a second, separated by commas")
    parser.add_argument("--first-rate", type=float, help="default: one request a second and device")
    parser.add_argument("--duration", type=float, default=60.0)
    parser.add_argument("--scale", type=float, help="divide all lengths by this, for small models")
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--out", type=Path, default=Path("benchmarks/results/box"))
    parser.add_argument("serve", nargs="*", help="after --: further options of nexusengine serve")
    args = parser.parse_args()
    label = args.devices
    if args.devices == "auto":
        gpus = count_cuda_devices()
        args.devices = "auto" if gpus else EMULATED
        label = f"{gpus} GPUs" if gpus else "EMULATED h100,2xa100,2xl4"
        if not gpus:
            print("no GPU here: the devices below are emulated on measured profiles; the figures are not of this box")
    args.first_rate = args.first_rate or float(len(args.devices.split(",")))
    rates = [float(r) for r in args.rates.split(",")] if args.rates else None
    began_s = time.monotonic()
    print(HEAD, flush=True)
    rows: list[dict[str, Any]] = []
    for system in args.systems.split(","):
        rows += run_system(args, system, rates, label)
        rates = rates or [r["rate_rps"] for r in rows]
    args.out.parent.mkdir(parents=True, exist_ok=True)
    made = {"taken_s": time.monotonic() - began_s, "options": {k: str(v) for k, v in vars(args).items()}, "rows": rows}
    args.out.with_suffix(".json").write_text(json.dumps(made, indent=1) + "\n")
    print("\n" + HEAD)
    for row in sorted(rows, key=lambda r: r["rate_rps"]):
        print(line(row))
    print(f"\nwrote {args.out.with_suffix('.json')}")
    if importlib.util.find_spec("matplotlib") is not None:
        plot(rows, args.out.with_suffix(".png"))
        print(f"wrote {args.out.with_suffix('.png')}")
    else:
        print("no plots: matplotlib is not installed", file=sys.stderr)


if __name__ == "__main__":
    main()
