"""Clusters of unlike devices: every engine policy with every router policy, simulated at rates around capacity.

    python -m benchmarks.cluster --traces ../shared/traces [--scenarios mixed,long] [--engines lens,fcfs]
        [--routers prism,least-requests,...] [--loads 0.7,0.9,1.0,1.15] [--seeds 1-3] [--duration 120]
        [--json out.json]

A load of 1 is the scenario's `capacity_rps`: about the rate at which LENS + PRISM keep 90 % of all promises.
Development is done on seeds 1-5; figures that are reported as unseen come from seeds from 101 on. Each line is written
to the JSON file as soon as it is known, and a run that is started again goes on where it was ended.
"""

from __future__ import annotations

import argparse
import itertools
import json
import time
from collections import defaultdict
from collections.abc import Iterable, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from nexusengine.sim.api import SimSpec, simulate

BASELINES = (
    "round-robin",
    "rr-veto",
    "least-requests",
    "least-tokens",
    "p2c",
    "capacity-weighted",
    "cache-aware",
    "lmetric",
    "paper-prism",
)
LOADS = (0.7, 0.9, 1.0, 1.15)


@dataclass(frozen=True, slots=True)
class Scenario:
    """devices, trace, classes: see SimSpec. capacity_rps: what a load of 1 is."""

    devices: str
    trace: str
    classes: str
    capacity_rps: float
    arrivals: str = "poisson"


SCENARIOS = {
    "mixed": Scenario("h100,2xa100,2xl4", "azure2023_conv.csv.gz", "mixed", 58.0),
    "interactive": Scenario("h100,2xa100,2xl4", "azure2023_conv.csv.gz", "interactive", 50.0),
    "long": Scenario("h100,a100,2xl40s", "mooncake_conversation.jsonl.gz", "mixed", 5.6),
    "consumer": Scenario("rtxpro6000,2xrtx4090", "azure2023_conv.csv.gz", "mixed", 21.0),
    "alike": Scenario("4xa100", "azure2023_conv.csv.gz", "mixed", 52.0),
}


def spec_of(scenario: Scenario, traces: Path, load: float, duration_s: float, **fields: Any) -> SimSpec:
    return SimSpec(
        trace=str(traces / scenario.trace),
        arrivals=scenario.arrivals,
        rate_rps=load * scenario.capacity_rps,
        duration_s=duration_s,
        devices=scenario.devices,
        classes=scenario.classes,
        **fields,
    )


def run_one(task: tuple[str, dict[str, Any], SimSpec]) -> dict[str, Any]:
    """One simulation, as a flat row."""
    scenario, keys, spec = task
    began_s = time.perf_counter()
    m = simulate(spec).metrics
    return {
        "scenario": scenario,
        **keys,
        "attainment": m["attainment"],
        "attainment_by_class": m["attainment_by_class"],
        "longest_decile": m["attainment_longest_decile"],
        "offered": m["offered"],
        "ttft_p50_ms": m["ttft_ms"]["p50"],
        "ttft_p99_ms": m["ttft_ms"]["p99"],
        "tpot_p50_ms": m["tpot_ms"]["p50"],
        "refused": m["refused"],
        "relegated": m["relegated"],
        "missed": m["missed"],
        "prefix_hit_rate": m["prefix_hit_rate"],
        "router_ms_p50": m["router_ms_p50"],
        "shares": [w["share"] for w in m["workers"]],
        "busy": [w["busy"] for w in m["workers"]],
        "took_s": time.perf_counter() - began_s,
    }


KEYS = ("scenario", "engine", "router", "load", "seed")


def run_all(tasks: Iterable[tuple[str, dict[str, Any], SimSpec]], jobs: int, out: Path | None) -> list[dict[str, Any]]:
    """Rows of all tasks; those that `out` holds already are not simulated again."""
    done: dict[str, dict[str, Any]] = {}
    if out is not None and out.exists():
        for line in out.read_text().splitlines():
            row = json.loads(line)
            done[_key(row)] = row
    tasks = list(tasks)
    wanted = [_key({"scenario": name, **keys}) for name, keys, _ in tasks]
    left = [t for t, key in zip(tasks, wanted, strict=True) if key not in done]
    began_s = time.perf_counter()
    with ProcessPoolExecutor(jobs) as pool:
        for n, row in enumerate(pool.map(run_one, left) if jobs > 1 else map(run_one, left)):
            done[_key(row)] = row
            if out is not None:
                with out.open("a") as file:
                    file.write(json.dumps(row) + "\n")
            passed_s = time.perf_counter() - began_s
            print(
                f"\r{n + 1}/{len(left)}, {passed_s:.0f} s, about {passed_s / (n + 1) * (len(left) - n - 1):.0f} s left "
                f"  {_key(row)} {row['attainment']:.3f}   ",
                end="",
                flush=True,
            )
    if left:
        print()
    return [done[key] for key in wanted]


def _key(row: dict[str, Any]) -> str:
    return json.dumps({k: v for k, v in row.items() if k in (*KEYS, "period_s", "loss", "fault", "scale")})


def mean_table(rows: Sequence[dict[str, Any]]) -> str:
    """Mean attainment over loads and seeds: a line for each engine + router, a column for each scenario."""
    cells: dict[tuple[str, str], list[float]] = defaultdict(list)
    for row in rows:
        cells[f"{row['engine']} + {row['router']}", row["scenario"]].append(row["attainment"])
    scenarios = list(dict.fromkeys(row["scenario"] for row in rows))
    lines = [f"{'engine + router':<34}" + "".join(f"{s:>13}" for s in scenarios)]
    for name in dict.fromkeys(f"{row['engine']} + {row['router']}" for row in rows):
        means = [sum(c) / len(c) if (c := cells[name, s]) else float("nan") for s in scenarios]
        lines.append(f"{name:<34}" + "".join(f"{mean:>13.3f}" for mean in means))
    return "\n".join(lines)


def worst_table(rows: Sequence[dict[str, Any]]) -> str:
    """With each engine: how far PRISM is from the best other router, at every rate of every scenario (seed means)."""
    points: dict[tuple[str, str, float], dict[str, list[float]]] = defaultdict(lambda: defaultdict(list))
    for row in rows:
        points[row["engine"], row["scenario"], row["load"]][row["router"]].append(row["attainment"])
    lines = [f"{'engine':<8}{'scenario':<14}{'load':>6}{'prism':>8}{'best other':>12}  which"]
    for (engine, scenario, load), routers in points.items():
        means = {name: sum(v) / len(v) for name, v in routers.items()}
        others = {name: v for name, v in means.items() if not name.startswith("prism")}
        prisms = {name: v for name, v in means.items() if name.startswith("prism")}
        if not others or not prisms:
            continue
        best = max(others, key=lambda name: others[name])
        for name, mean in prisms.items():
            lines.append(
                f"{engine:<8}{scenario:<14}{load:>6.2f}{mean:>8.3f}{others[best]:>12.3f}  {best}"
                f"{'' if name == 'prism' else '  (' + name + ')'}{'   <-- worse' if mean < others[best] - 0.01 else ''}"
            )
    return "\n".join(lines)


def seeds_of(text: str) -> list[int]:
    first, _, last = text.partition("-")
    return list(range(int(first), int(last or first) + 1))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--traces", type=Path, required=True, help="folder with the public traces")
    parser.add_argument("--scenarios", default=",".join(SCENARIOS))
    parser.add_argument("--engines", default="lens,fcfs")
    parser.add_argument("--routers", nargs="+", default=["prism", *BASELINES])
    parser.add_argument("--loads", default=",".join(map(str, LOADS)))
    parser.add_argument("--seeds", default="1-3", help="FIRST-LAST")
    parser.add_argument("--duration", type=float, default=120.0)
    parser.add_argument("--jobs", type=int, default=1)
    parser.add_argument("--json", type=Path, help="JSON lines, one a simulation")
    args = parser.parse_args()
    tasks = [
        (
            name,
            {"engine": engine, "router": router, "load": load, "seed": seed},
            spec_of(SCENARIOS[name], args.traces, load, args.duration, engine=engine, router=router, seed=seed),
        )
        for name, seed, load, engine, router in itertools.product(
            args.scenarios.split(","),
            seeds_of(args.seeds),
            map(float, args.loads.split(",")),
            args.engines.split(","),
            args.routers,
        )
    ]
    rows = run_all(tasks, args.jobs, args.json)
    print(mean_table(rows), worst_table(rows), sep="\n\n")


if __name__ == "__main__":
    main()
