"""What a server did with a load that it recorded, beside what the simulator says of the recording.

    python -m benchmarks.recorded_vs_sim [--cases cpu1,cpu1-no-slo,cpu2,cpu2-no-slo,emulated] [--duration 300]
        [--rounds 3] [--seeds 5] [--keep FOLDER] [--json FILE]

Each case starts `nexusengine serve --record-trace`, offers it an open loop of requests, ends it, and simulates the
recording with the settings, the devices and the time between steps that are in it: nothing is set by hand. For the CPU
cases leave the machine alone: what others compute on it is in the recording as slower steps, but as a mean of seconds.
Rounds take the cases in turn and have seeds of their own. What is to be shown: attainment within 3 points, TPOT within
5 %, in the median of rounds.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import median
from typing import Any

from nexusengine.loadgen.http import Target
from nexusengine.loadgen.items import items_of
from nexusengine.loadgen.run import offer
from nexusengine.loadgen.server import ask, own_server
from nexusengine.sim.workload.build import Builder, WorkloadSpec

MOST_ATTAINMENT_POINTS, MOST_TPOT_PERCENT = 3.0, 5.0


@dataclass(frozen=True, slots=True)
class Case:
    """A server and a load."""

    devices: str
    classes: str
    lengths: str
    rate_rps: float


_SHORT, _LONG = "input=logn:80:250,output=exp:30", "input=logn:500:2000,output=exp:120"
CASES = {
    "cpu1": Case("cpu:1", "mixed", _SHORT, 0.6),
    "cpu1-no-slo": Case("cpu:1", "none", _SHORT, 0.6),
    "cpu2": Case("cpu:1,cpu:1", "mixed", _SHORT, 1.2),
    "cpu2-no-slo": Case("cpu:1,cpu:1", "none", _SHORT, 1.2),
    "emulated": Case("emulated:l4,emulated:a10", "mixed", _LONG, 1.6),
    "emulated-no-slo": Case("emulated:l4,emulated:a10", "none", _LONG, 1.6),
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--cases", default=",".join(CASES), help="default: all")
    parser.add_argument("--duration", type=float, default=300.0, help="seconds in which requests are sent")
    parser.add_argument(
        "--rate-factor", type=float, default=1.0, help="times the rate of every case, for slow machines"
    )
    parser.add_argument("--engine", default="lens", help="engine policy")
    parser.add_argument("--router", default="prism", help="placement policy")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--seed", type=int, default=1, help="of the first round")
    parser.add_argument("--seeds", type=int, default=5, help="simulations of each recording")
    parser.add_argument("--keep", type=Path, help="folder for the recordings; default: they are removed")
    parser.add_argument("--json", type=Path)
    args = parser.parse_args()
    names = args.cases.split(",")
    if unknown := [name for name in names if name not in CASES]:
        parser.error(f"unknown case {unknown[0]!r}; there are {', '.join(CASES)}")
    found: dict[str, list[dict[str, Any]]] = {name: [] for name in names}
    with tempfile.TemporaryDirectory() as temporary:
        folder = args.keep or Path(temporary)
        folder.mkdir(parents=True, exist_ok=True)
        for turn in range(args.rounds):
            for name in names:
                made = one(CASES[name], folder / f"{name}-{turn}.jsonl", args, args.seed + turn)
                found[name].append(made)
                show(name, turn, made)
    summary = {name: summary_of(rounds) for name, rounds in found.items()}
    for name, s in summary.items():
        print(
            f"{name}: median of {len(found[name])}: attainment {s['attainment_points']:+.1f} points, TPOT mean "
            f"{s['tpot_mean_percent']:+.1f} %, p50 {s['tpot_p50_percent']:+.1f} %: "
            f"{'within' if s['within'] else 'NOT within'} {MOST_ATTAINMENT_POINTS:g} points and {MOST_TPOT_PERCENT:g} %"
        )
    if args.json:
        options = {key: str(value) for key, value in vars(args).items()}
        args.json.write_text(json.dumps({"options": options, "rounds": found, "summary": summary}, indent=1) + "\n")


def one(case: Case, file: Path, args: argparse.Namespace, seed: int) -> dict[str, Any]:
    """Record a load, and compare the recording with its simulation; the load average of the machine beside."""
    file.unlink(missing_ok=True)
    busy = [os.getloadavg()[0]]
    options = ["--devices", case.devices, "--record-trace", str(file), "--log-level", "warning", "--seed", str(seed)]
    options += ["--scheduler", args.engine, "--router", args.router]
    with own_server(options) as url:
        info = ask(url)
        spec = WorkloadSpec(
            trace=f"lengths:{case.lengths}",
            arrivals="poisson",
            rate_rps=case.rate_rps * args.rate_factor,
            duration_s=args.duration,
            classes=case.classes,
            seed=seed,
            max_tokens=info.max_model_len or 4096,
        )
        offer(Target(url), items_of(Builder(spec).build()), info, seed=seed)
    busy.append(os.getloadavg()[0])
    command = [sys.executable, "-m", "nexusengine.cli.main", "sim", "compare", "--json"]
    command += ["--trace", str(file), "--seeds", str(args.seeds)]
    done = subprocess.run(command, stdout=subprocess.PIPE, check=True)
    compared: dict[str, Any] = json.loads(done.stdout)
    return compared | {"load_average": busy}


def summary_of(rounds: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """Medians of the differences, and whether they are within what is to be shown."""

    def middle(*keys: str) -> float:
        values = []
        for made in rounds:
            value: Any = made["difference"]
            for key in keys:
                value = value[key]
            values.append(value)
        return float(median(values))

    points, mean, p50 = middle("attainment_points"), middle("tpot_percent", "mean"), middle("tpot_percent", "p50")
    return {
        "attainment_points": points,
        "tpot_mean_percent": mean,
        "tpot_p50_percent": p50,
        "ttft_mean_percent": middle("ttft_percent", "mean"),
        "ttft_p50_percent": middle("ttft_percent", "p50"),
        "within": abs(points) <= MOST_ATTAINMENT_POINTS and max(abs(mean), abs(p50)) <= MOST_TPOT_PERCENT,
    }


def show(name: str, turn: int, made: dict[str, Any]) -> None:
    recorded, simulated, off = made["recorded"], made["simulated"], made["difference"]
    print(
        f"{name} round {turn}: {made['requests']} requests, attainment {100 * recorded['attainment']:.1f} recorded, "
        f"{100 * simulated['attainment']:.1f} simulated (%); load average {made['load_average'][0]:.1f} to "
        f"{made['load_average'][1]:.1f}; {made['assumed']['between_steps_ms']:.2f} ms between steps"
    )
    print(f"{'':8}{'':10}{'recorded ms':>14}{'simulated ms':>14}{'':>10}")
    for key in ("ttft", "tpot", "e2e"):
        for q in ("mean", "p50", "p90", "p99"):
            was, says, percent = recorded[f"{key}_ms"][q], simulated[f"{key}_ms"][q], off[f"{key}_percent"][q]
            print(f"{'':8}{key} {q:6}{was:>14.1f}{says:>14.1f}{percent:>+9.1f}%")
    print(f"{'':8}by worker: {recorded['by_worker']} recorded, {simulated['by_worker']} simulated", flush=True)


if __name__ == "__main__":
    main()
