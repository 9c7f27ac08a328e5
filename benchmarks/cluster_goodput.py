"""Goodput of whole systems on a cluster: the highest rate at which 90 % of all promises are kept, simulated.

    python -m benchmarks.cluster_goodput --traces ../shared/traces [--scenario long] [--duration 60] [--seeds 101-103]
        [--systems fcfs/round-robin fcfs/capacity-weighted lens/prism] [--precision 0.05] --json out.jsonl

A rate holds if the means over seeds of all requests, and of the longest tenth of prompts (75 %), do. Each line is
written as soon as it is known, and a run that is started again goes on where it was ended.
"""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from benchmarks.cluster import SCENARIOS, seeds_of, spec_of
from nexusengine.sim.goodput import goodput

SYSTEMS = ("fcfs/round-robin", "fcfs/capacity-weighted", "lens/prism")
TARGET, LONGEST_DECILE = 0.9, 0.75
_FIRST_LOAD = 0.25


def search(args: argparse.Namespace, system: str, longest_decile: float) -> dict[str, Any]:
    engine, _, router = system.partition("/")
    scenario = SCENARIOS[args.scenario]
    spec = spec_of(scenario, args.traces, 1.0, args.duration, engine=engine, router=router)
    began_s = time.perf_counter()
    found = goodput(
        spec,
        target=TARGET,
        longest_decile=longest_decile,
        seeds=seeds_of(args.seeds),
        precision=args.precision,
        first_rate_rps=_FIRST_LOAD * scenario.capacity_rps,
        progress=lambda tried: print(f"{system}: {tried.rate_rps:.3g}/s {tried.attainment:.3f}", flush=True),
    )
    return {
        "scenario": args.scenario,
        "engine": engine,
        "router": router,
        "seeds": args.seeds,
        "duration_s": args.duration,
        "longest_decile": longest_decile,
        "goodput_rps": found.rate_rps,
        "tried": [asdict(t) for t in found.tried],
        "took_s": time.perf_counter() - began_s,
    }


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--traces", type=Path, required=True, help="folder with the public traces")
    parser.add_argument("--scenario", default="long", choices=sorted(SCENARIOS))
    parser.add_argument("--systems", nargs="+", default=SYSTEMS, help="ENGINE/ROUTER")
    parser.add_argument("--seeds", default="1-3", help="FIRST-LAST")
    parser.add_argument("--duration", type=float, default=60.0)
    parser.add_argument("--precision", type=float, default=0.05)
    parser.add_argument("--longest-deciles", default="0.75", help="0: of all requests only")
    parser.add_argument("--json", type=Path, required=True, help="JSON lines, one a search")
    args = parser.parse_args(argv)
    rows = [json.loads(line) for line in args.json.read_text().splitlines()] if args.json.exists() else []
    for longest_decile in map(float, args.longest_deciles.split(",")):
        for system in args.systems:
            wanted = (args.scenario, *system.split("/"), args.seeds, args.duration, longest_decile)
            if any(key_of(row) == wanted for row in rows):
                continue
            rows.append(search(args, system, longest_decile))
            with args.json.open("a") as file:
                file.write(json.dumps(rows[-1]) + "\n")
    print(table(rows))


def key_of(row: dict[str, Any]) -> tuple[Any, ...]:
    return tuple(row[k] for k in ("scenario", "engine", "router", "seeds", "duration_s", "longest_decile"))


def table(rows: Sequence[dict[str, Any]]) -> str:
    """Markdown: goodput of each system, and how many times that of it LENS + PRISM have."""
    lines = [
        "| scenario | engine + router | longest tenth | goodput (requests/s) | LENS + PRISM have |",
        "|---|---|---|---|---|",
    ]
    best = {
        (r["scenario"], r["longest_decile"]): r["goodput_rps"]
        for r in rows
        if (r["engine"], r["router"]) == ("lens", "prism")
    }
    for r in rows:
        mine = best.get((r["scenario"], r["longest_decile"]))
        times = "" if mine is None else "it is zero" if not r["goodput_rps"] else f"{mine / r['goodput_rps']:.1f}x"
        wanted = f"{100 * r['longest_decile']:g} %"
        lines.append(
            f"| {r['scenario']} | {r['engine']} + {r['router']} | {wanted} | {r['goodput_rps']:.3g} | {times} |"
        )
    return "\n".join(lines)


if __name__ == "__main__":
    main()
