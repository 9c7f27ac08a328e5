"""Clusters of unlike devices: every engine policy with every router policy, simulated at rates around capacity.

    python -m benchmarks.cluster --traces ../shared/traces [--scenarios mixed,long] [--engines lens,fcfs]
        [--routers prism,least-requests,...] [--loads 0.7,0.9,1.0,1.15] [--seeds 1-3] [--duration 120]
        [--periods 0.02,0.1,2] [--losses 0,0.2] [--faults none slow:0:20:1.4 crash:1:20:10 join:2:20]
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
    """devices, trace, classes, prefix_caching: see SimSpec. capacity_rps: what a load of 1 is; of a trace of sessions,
    in sessions that begin."""

    devices: str
    trace: str
    classes: str
    capacity_rps: float
    arrivals: str = "poisson"
    prefix_caching: bool = False


SCENARIOS = {
    "mixed": Scenario("h100,2xa100,2xl4", "azure2023_conv.csv.gz", "mixed", 58.0),
    "interactive": Scenario("h100,2xa100,2xl4", "azure2023_conv.csv.gz", "interactive", 50.0),
    "long": Scenario("h100,a100,2xl40s", "mooncake_conversation.jsonl.gz", "mixed", 5.6),
    "consumer": Scenario("rtxpro6000,2xrtx4090", "azure2023_conv.csv.gz", "mixed", 21.0),
    "alike": Scenario("4xa100", "azure2023_conv.csv.gz", "mixed", 52.0),
    "shared": Scenario("h100,2xa100,2xl4", "mooncake_conversation.jsonl.gz", "mixed", 9.0, prefix_caching=True),
    "shared-alike": Scenario("4xa100", "mooncake_conversation.jsonl.gz", "mixed", 9.0, prefix_caching=True),
    "mixed-20": Scenario("4xh100,8xa100,8xl4", "azure2023_conv.csv.gz", "mixed", 4 * 58.0),
    "mixed-60": Scenario("12xh100,24xa100,24xl4", "azure2023_conv.csv.gz", "mixed", 12 * 58.0),
    "agentic": Scenario("4xh100", "agentic_claude_code_weka.jsonl.gz", "mixed", 0.6, prefix_caching=True),
}
UNSHARED = ("mixed", "interactive", "long", "consumer", "alike")


def spec_of(scenario: Scenario, traces: Path, load: float, duration_s: float, **fields: Any) -> SimSpec:
    return SimSpec(
        trace=str(traces / scenario.trace),
        arrivals=scenario.arrivals,
        rate_rps=load * scenario.capacity_rps,
        duration_s=duration_s,
        devices=scenario.devices,
        classes=scenario.classes,
        prefix_caching=scenario.prefix_caching,
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
        "duration_s": spec.duration_s,
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
VARIATIONS = ("period_s", "loss", "fault")
"""Of the conditions; in a row only where they are not the usual ones."""


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
    return json.dumps({k: v for k, v in row.items() if k in (*KEYS, *VARIATIONS)})


def name_of(row: dict[str, Any]) -> str:
    """Engine, router, and under which conditions."""
    under = [f"{k}={row[k]}" for k in VARIATIONS if k in row]
    return " ".join([f"{row['engine']} + {row['router']}", *under])


def mean_table(rows: Sequence[dict[str, Any]], value: str = "attainment") -> str:
    """Mean over loads and seeds: a line for each engine + router, a column for each scenario."""
    cells: dict[tuple[str, str], list[float]] = defaultdict(list)
    for row in rows:
        cells[name_of(row), row["scenario"]].append(row[value])
    scenarios = list(dict.fromkeys(row["scenario"] for row in rows))
    lines = [f"{'engine + router':<44}" + "".join(f"{s:>13}" for s in scenarios)]
    for name in dict.fromkeys(map(name_of, rows)):
        means = [sum(c) / len(c) if (c := cells[name, s]) else float("nan") for s in scenarios]
        lines.append(f"{name:<44}" + "".join(f"{mean:>13.3f}" for mean in means))
    return "\n".join(lines)


def worst_table(rows: Sequence[dict[str, Any]]) -> str:
    """With each engine: how far PRISM is from the best other router, at every rate of every scenario (seed means)."""
    points: dict[tuple[str, str, float], dict[str, list[float]]] = defaultdict(lambda: defaultdict(list))
    for row in rows:
        if any(key in row for key in VARIATIONS):
            continue
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


def variations(periods: str, losses: str, faults: Sequence[str]) -> list[tuple[dict[str, Any], dict[str, Any]]]:
    """Of the conditions: (what a row says of them, what SimSpec is given)."""
    varied = []
    usual = SimSpec(trace="", devices="")
    for period, loss, fault in itertools.product(map(float, periods.split(",")), map(float, losses.split(",")), faults):
        keys: dict[str, Any] = {}
        if period != usual.snapshot_period_s:
            keys["period_s"] = period
        if loss != usual.loss:
            keys["loss"] = loss
        if fault != "none":
            keys["fault"] = fault
        named = () if fault == "none" else tuple(fault.split("+"))
        varied.append((keys, {"snapshot_period_s": period, "loss": loss, "faults": named}))
    return varied


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--traces", type=Path, required=True, help="folder with the public traces")
    parser.add_argument("--scenarios", default=",".join(UNSHARED), help=f"of {', '.join(SCENARIOS)}")
    parser.add_argument("--engines", default="lens,fcfs")
    parser.add_argument("--routers", nargs="+", default=["prism", *BASELINES])
    parser.add_argument("--loads", default=",".join(map(str, LOADS)))
    parser.add_argument("--seeds", default="1-3", help="FIRST-LAST")
    parser.add_argument("--duration", type=float, default=120.0)
    parser.add_argument("--periods", default="0.1", help="seconds between a worker's reports")
    parser.add_argument("--losses", default="0", help="shares of reports that are lost")
    parser.add_argument("--faults", nargs="+", default=["none"], help="see nexusengine.sim.faults; A+B: both")
    parser.add_argument("--jobs", type=int, default=1)
    parser.add_argument("--json", type=Path, help="JSON lines, one a simulation")
    args = parser.parse_args()
    tasks = []
    for name, seed, load, engine, router, (keys, fields) in itertools.product(
        args.scenarios.split(","),
        seeds_of(args.seeds),
        map(float, args.loads.split(",")),
        args.engines.split(","),
        args.routers,
        variations(args.periods, args.losses, args.faults),
    ):
        fields = fields | {"engine": engine, "router": router, "seed": seed}
        spec = spec_of(SCENARIOS[name], args.traces, load, args.duration, **fields)
        tasks.append((name, {"engine": engine, "router": router, "load": load, "seed": seed, **keys}, spec))
    rows = run_all(tasks, args.jobs, args.json)
    print(mean_table(rows), worst_table(rows), sep="\n\n")
    cached = [row for row in rows if row["prefix_hit_rate"]]
    if cached:
        print("\nprefix hit rate", mean_table(cached, "prefix_hit_rate"), sep="\n\n")


if __name__ == "__main__":
    main()
