"""Policies as shares of what any schedule could do: attainment over the bound of nexusengine.sim.bound, simulated.

    python -m benchmarks.bound engine --traces ../shared/traces [--devices rtxpro6000,h100] [--workloads azure,long,...]
        [--policies lens fcfs:budget=1024 ...] [--loads 0.8,1,1.2,1.5] [--seeds 1-2] [--duration S] --json out.jsonl
    python -m benchmarks.bound cluster --traces ../shared/traces [--scenarios mixed,long,...]
        [--policies lens/prism lens/least-requests fcfs/least-requests ...] ... --json out.jsonl

A load of 1 is the goodput of LENS in docs/evaluation.md, and the capacity of a scenario in benchmarks/cluster.py. Steps
do not scatter, neither in the simulation nor in the bound. Development is done on seeds 1-5; figures that are reported
as unseen come from seeds from 101 on. Each line is written as soon as it is known, and a run that is started again goes
on where it was ended.
"""

from __future__ import annotations

import argparse
import itertools
import json
import tempfile
from collections import defaultdict
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks.cluster import SCENARIOS, seeds_of, spec_of
from benchmarks.engine import MAX_BATCH_TOKENS
from benchmarks.engine_workloads import WORKLOADS
from nexusengine.profiles.registry import load_profile
from nexusengine.sim.api import SimSpec, parse_devices, simulate
from nexusengine.sim.bound import Bound, EngineLimits, upper_bound
from nexusengine.sim.cluster import HOPS
from nexusengine.sim.verdicts import tabulate
from nexusengine.sim.workload.build import Workload

ENGINE_POLICIES = ("lens", "srpt:budget=512", "edf:budget=512,relegate=1", "paper-lens", "fcfs:budget=1024")
CLUSTER_POLICIES = ("lens/prism", "lens/capacity-weighted", "lens/least-requests", "fcfs/least-requests")
LOADS = "0.8,1,1.2,1.5"
CAPACITY_RPS = {
    "rtxpro6000": {"azure": 10.5, "sharegpt": 23.6, "long": 3.6, "servegen": 250.0, "mixed": 10.5, "bursty": 8.0},
    "h100": {"azure": 25.4, "sharegpt": 48.8, "long": 10.5, "servegen": 514.0, "mixed": 25.4, "bursty": 20.0},
}
UNSEEN_OF = {"azure-2": "azure", "long-2": "long", "mixed-2": "mixed", "bursty-2": "bursty"}
KEYS = ("case", "load", "seed", "policy")
USUAL_RUNNING = 256
_WORTH = 1e-3
_TENTHS = 10


@dataclass(frozen=True, slots=True)
class Case:
    """A load to be served. spec: of its simulation but for the policies."""

    name: str
    load: float
    spec: SimSpec


def engine_cases(args: argparse.Namespace, folder: Path) -> Iterator[Case]:
    made: dict[str, Path] = {}
    for device, name, load, seed in itertools.product(
        args.devices.split(","), args.workloads.split(","), args.loads, args.seeds
    ):
        workload = WORKLOADS[name]
        if name not in made:
            made[name] = workload.make(args.traces, folder)
        spec = SimSpec(
            trace=str(made[name]),
            devices=device,
            arrivals=workload.arrivals,
            classes=workload.classes,
            duration_s=args.duration or workload.duration_s,
            rate_rps=load * CAPACITY_RPS[device][UNSEEN_OF.get(name, name)],
            max_batch_tokens=MAX_BATCH_TOKENS,
            max_running=args.max_running,
            noise=False,
            seed=seed,
        )
        slots = "" if args.max_running == USUAL_RUNNING else f", {args.max_running} running"
        yield Case(f"{device} {name}{slots}", load, spec)


def cluster_cases(args: argparse.Namespace, folder: Path) -> Iterator[Case]:
    del folder
    for name, load, seed in itertools.product(args.scenarios.split(","), args.loads, args.seeds):
        if SCENARIOS[name].prefix_caching:
            raise SystemExit(f"{name} reuses prefixes, of which the bound knows nothing")
        duration_s = args.duration or 60.0
        fields = {"noise": False, "seed": seed, "max_running": args.max_running}
        slots = "" if args.max_running == USUAL_RUNNING else f", {args.max_running} running"
        yield Case(f"{name}{slots}", load, spec_of(SCENARIOS[name], args.traces, load, duration_s, **fields))


def run(case: Case, policies: Sequence[str], done: set[str]) -> Iterator[dict[str, Any]]:
    """One row a policy that is not done yet."""
    bound: Bound | None = None
    for policy in policies:
        keys = {"case": case.name, "load": case.load, "seed": case.spec.seed, "policy": policy}
        if key_of(keys) in done:
            continue
        engine, _, router = policy.partition("/")
        result = simulate(replace(case.spec, engine=engine, router=router or "prism"))
        bound = bound or bound_of(case.spec, result.workload)
        outcomes = tabulate(result.outcomes, 0.0)
        met, done_s = outcomes.met, bound.least_s[~np.isnan(outcomes.last_s)]
        alike = len(set(parse_devices(case.spec.devices))) == 1
        busy_s = result.metrics["simulated_s"] * sum(w["busy"] for w in result.metrics["workers"])
        yield {
            **keys,
            "offered": len(met),
            "rate_rps": case.spec.rate_rps,
            "duration_s": case.spec.duration_s,
            "attainment": float(met.mean()),
            "bound": bound.share,
            "bound_work_only": bound.work_only,
            "accounted": float(done_s[np.isfinite(done_s)].sum()) / busy_s if alike else None,
            "by_class": by_class(result.workload, met, bound),
            "by_tenth": by_tenth(result.workload, met, bound),
            "missed": result.metrics["missed"],
            "relegated": result.metrics["relegated"],
            "busy": [w["busy"] for w in result.metrics["workers"]],
        }


def bound_of(spec: SimSpec, workload: Workload) -> Bound:
    profiles = [load_profile(name, spec.model) for name in parse_devices(spec.devices)]
    limits = EngineLimits(spec.max_batch_tokens, spec.max_running, spec.block_size, HOPS * spec.link_delay_s)
    return upper_bound(workload.jobs, profiles, limits)


def by_class(workload: Workload, met: np.ndarray, bound: Bound) -> dict[str, list[float]]:
    """Shares that are in time, and that are worth their device time in the bound."""
    names = np.array([job.request.slo_class for job in workload.jobs])
    worth = bound.value > _WORTH
    return {str(n): [float(met[names == n].mean()), float(worth[names == n].mean())] for n in sorted(set(names))}


def by_tenth(workload: Workload, met: np.ndarray, bound: Bound) -> list[list[float]]:
    """The same by tenth of prompt length, the shortest first."""
    order = np.argsort([job.prompt_tokens for job in workload.jobs], kind="stable")
    worth = bound.value > _WORTH
    return [[float(met[i].mean()), float(worth[i].mean())] for i in np.array_split(order, _TENTHS) if len(i)]


def key_of(row: dict[str, Any]) -> str:
    return json.dumps([row[k] for k in KEYS])


def table(rows: Sequence[dict[str, Any]]) -> str:
    """Markdown: the bound, and each policy as a share of it (its attainment in brackets), means over seeds."""
    cells: dict[tuple[str, float], dict[str, list[float]]] = defaultdict(lambda: defaultdict(list))
    bounds: dict[tuple[str, float], list[float]] = defaultdict(list)
    policies = list(dict.fromkeys(row["policy"] for row in rows))
    for row in rows:
        at = row["case"], row["load"]
        cells[at][row["policy"]].append(row["attainment"])
        if row["policy"] == policies[0]:
            bounds[at].append(row["bound"])
    lines = ["| load | | bound | " + " | ".join(policies) + " |", "|---" * (3 + len(policies)) + "|"]
    for at, found in cells.items():
        bound = float(np.mean(bounds[at] or [np.nan]))
        shares = [
            f"{100 * np.mean(found[p]) / bound:.1f} ({100 * np.mean(found[p]):.1f})" if found[p] else ""
            for p in policies
        ]
        lines.append(f"| {at[0]} | {at[1]:g} | {100 * bound:.1f} | " + " | ".join(shares) + " |")
    return "\n".join(lines)


def gaps(rows: Sequence[dict[str, Any]], policy: str) -> str:
    """Where the policy is farthest below the bound: by class, and by tenth of prompt length (in time / worth it)."""
    mine = sorted((r for r in rows if r["policy"] == policy), key=lambda r: r["attainment"] - r["bound"])
    lines = [f"{policy}, farthest below the bound (in percent, in time / worth it in the bound):"]
    for row in mine[:5]:
        classes = ", ".join(f"{name} {100 * a:.0f}/{100 * b:.0f}" for name, (a, b) in row["by_class"].items())
        tenths = " ".join(f"{100 * a:.0f}/{100 * b:.0f}" for a, b in row["by_tenth"])
        busy = " ".join(f"{100 * b:.0f}" for b in row["busy"])
        missed = ", ".join(f"{count} {why}" for why, count in row["missed"].items())
        accounted = "" if row["accounted"] is None else f" (it accounts for {100 * row['accounted']:.0f} of busy time)"
        lines.append(
            f"{row['case']} x {row['load']:g}, seed {row['seed']}: {100 * row['attainment']:.1f} of "
            f"{100 * row['bound']:.1f}{accounted}; {classes}; "
            f"by prompt length {tenths}; busy {busy}; missed: {missed}"
        )
    return "\n".join(lines)


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=("engine", "cluster"))
    parser.add_argument("--traces", type=Path, required=True, help="folder with the public traces")
    parser.add_argument("--devices", default="rtxpro6000,h100", help=f"of {', '.join(CAPACITY_RPS)}")
    parser.add_argument(
        "--workloads", default="azure,sharegpt,long,servegen", help="see benchmarks/engine_workloads.py"
    )
    parser.add_argument(
        "--scenarios", default="mixed,interactive,long,consumer,alike", help="see benchmarks/cluster.py"
    )
    parser.add_argument(
        "--policies", nargs="+", help="ENGINE, or ENGINE/ROUTER; the first is the one whose gaps are told"
    )
    parser.add_argument("--loads", type=lambda text: [float(word) for word in text.split(",")], default=LOADS)
    parser.add_argument("--seeds", type=seeds_of, default="1-2", help="FIRST-LAST")
    parser.add_argument("--duration", type=float, help="seconds of arrivals, in place of the workload's own, or 60")
    parser.add_argument("--max-running", type=int, default=USUAL_RUNNING, help="running slots of each engine")
    parser.add_argument("--json", type=Path, required=True, help="JSON lines, one a simulation; read and added to")
    args = parser.parse_args(argv)
    policies = args.policies or (ENGINE_POLICIES if args.what == "engine" else CLUSTER_POLICIES)
    rows = [json.loads(line) for line in args.json.read_text().splitlines()] if args.json.exists() else []
    done = {key_of(row) for row in rows}
    with tempfile.TemporaryDirectory() as folder:
        cases = (engine_cases if args.what == "engine" else cluster_cases)(args, Path(folder))
        for case in cases:
            for row in run(case, policies, done):
                rows.append(row)
                with args.json.open("a") as file:
                    file.write(json.dumps(row) + "\n")
                print(key_of(row), f"{100 * row['attainment']:.1f} of {100 * row['bound']:.1f} %", flush=True)
    print(table(rows), gaps(rows, policies[0]), sep="\n\n")


if __name__ == "__main__":
    main()
