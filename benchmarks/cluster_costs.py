"""Money and energy of clusters of unlike devices: PRISM as it is, and preferring the cheaper of workers with margin.

    python -m benchmarks.cluster_costs --traces ../shared/traces [--clusters h100,l40s,l4=34 h100,2xa100,2xl4=58]
        [--routers prism prism:energy=1 prism:cost=1 least-requests] [--loads 0.3,0.5,0.8] [--seeds 1-2] [--duration 60]
        --json out.jsonl

A cluster is DEVICES=RATE, the rate being what a load of 1 is. Prices and watts are those of `nexusengine plan`. Each
line is written as soon as it is known, and a run that is started again goes on where it was ended.
"""

from __future__ import annotations

import argparse
import itertools
import json
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from statistics import fmean
from typing import Any

from benchmarks.cluster import seeds_of
from nexusengine.profiles.prices import usual_costs
from nexusengine.sim.api import SimSpec, parse_devices, simulate
from nexusengine.sim.costs import costs_of

CLUSTERS = ("h100,l40s,l4=34", "h100,2xa100,2xl4=58")
ROUTERS = ("prism", "prism:energy=1", "prism:cost=1", "least-requests")
TRACE = "azure2023_conv.csv.gz"
KEYS = ("cluster", "load", "seed", "router", "duration_s")


def run(keys: dict[str, Any], traces: Path) -> dict[str, Any]:
    devices, _, rate = keys["cluster"].partition("=")
    spec = SimSpec(
        trace=str(traces / TRACE),
        devices=devices,
        arrivals="poisson",
        rate_rps=keys["load"] * float(rate),
        duration_s=keys["duration_s"],
        router=keys["router"],
        classes="mixed",
        seed=keys["seed"],
    )
    m = simulate(spec).metrics
    return {
        **keys,
        "attainment": m["attainment"],
        "attainment_by_class": m["attainment_by_class"],
        "ttft_p50_ms": m["ttft_ms"]["p50"],
        "tpot_p50_ms": m["tpot_ms"]["p50"],
        "shares": [w["share"] for w in m["workers"]],
        **asdict(costs_of(m, parse_devices(devices), usual_costs())),
    }


def table(rows: Sequence[dict[str, Any]]) -> str:
    """Markdown, means over seeds; how much less than with the first router in brackets."""
    groups: dict[tuple[str, float], dict[str, list[dict[str, Any]]]] = defaultdict(lambda: defaultdict(list))
    for row in rows:
        groups[row["cluster"], row["load"]][row["router"]].append(row)
    titles = ("cluster", "load", "router", "attainment", "J a kept one", "$ for 1,000 kept", "TTFT, TPOT p50 (ms)")
    lines = [f"| {' | '.join(titles)} |", "|---" * len(titles) + "|"]
    for (cluster, load), routers in groups.items():
        usual = next(iter(routers.values()))
        for router, found in routers.items():
            cells = []
            for key, factor in (("joules_per_kept", 1.0), ("usd_per_kept", 1e3)):
                values = [[r[key] for r in group if r[key] is not None] for group in (found, usual)]
                mean, before = (fmean(v) if v else float("nan") for v in values)
                less = "" if found is usual else f" ({100 * (mean / before - 1):+.0f} %)"
                cells.append(f"{factor * mean:.3g}{less}")
            means = [fmean(r[key] for r in found) for key in ("attainment", "ttft_p50_ms", "tpot_p50_ms")]
            lines.append(
                f"| {cluster.partition('=')[0]} | {load:g} | {router} | {100 * means[0]:.1f} | {' | '.join(cells)} | "
                f"{means[1]:.0f}, {means[2]:.0f} |"
            )
    return "\n".join(lines)


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--traces", type=Path, required=True, help="folder with the public traces")
    parser.add_argument("--clusters", nargs="+", default=CLUSTERS, help="DEVICES=RATE")
    parser.add_argument("--routers", nargs="+", default=ROUTERS)
    parser.add_argument("--loads", default="0.3,0.5,0.8")
    parser.add_argument("--seeds", type=seeds_of, default="1-2", help="FIRST-LAST")
    parser.add_argument("--duration", type=float, default=60.0)
    parser.add_argument("--json", type=Path, required=True, help="JSON lines, one a simulation; read and added to")
    args = parser.parse_args(argv)
    rows = [json.loads(line) for line in args.json.read_text().splitlines()] if args.json.exists() else []
    done = {tuple(row[k] for k in KEYS) for row in rows}
    loads = map(float, args.loads.split(","))
    for key in itertools.product(args.clusters, loads, args.seeds, args.routers, [args.duration]):
        if key not in done:
            rows.append(run(dict(zip(KEYS, key, strict=True)), args.traces))
            with args.json.open("a") as file:
                file.write(json.dumps(rows[-1]) + "\n")
            print(key, f"{100 * rows[-1]['attainment']:.1f} %, {rows[-1]['joules_per_kept']:.3g} J", flush=True)
    print(table(rows))


if __name__ == "__main__":
    main()
