"""Tables and a plot from the JSON lines of benchmarks.cluster, as they stand in docs/evaluation-cluster.md.

    python -m benchmarks.cluster_report benchmarks/results/cluster-2026-11-25.jsonl [--plot docs/images/cluster.png]

Prints Markdown. Every figure is a simulation's. Means are over loads and seeds, and only over those points that every
system of a table's column has, so that no system is judged by easier ones than another.
"""

from __future__ import annotations

import argparse
import json
from collections import defaultdict
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from statistics import fmean
from typing import Any

Row = dict[str, Any]
CONDITIONS = ("period_s", "loss", "fault")
_WORSE = 0.01


def read(path: Path) -> list[Row]:
    return [json.loads(line) for line in path.read_text().splitlines() if line.strip()]


def system_of(row: Row) -> str:
    return f"{row['engine'].upper() if row['engine'] in ('lens', 'fcfs') else row['engine']} + {row['router']}"


def condition_of(row: Row) -> str:
    told = {
        "period_s": lambda v: f"reports every {1e3 * v:g} ms",
        "loss": lambda v: f"{100 * v:g} % of reports lost",
        "fault": lambda v: f"fault {v}",
    }
    return ", ".join(told[key](row[key]) for key in CONDITIONS if key in row) or "as usual"


def usual(rows: Iterable[Row]) -> list[Row]:
    """Those under the usual conditions."""
    return [r for r in rows if not any(key in r for key in CONDITIONS)]


def point_of(row: Row) -> tuple[float, int]:
    return row["load"], row["seed"]


def common_means(
    rows: Sequence[Row], name: Callable[[Row], str], value: str = "attainment"
) -> dict[tuple[str, str], tuple[float, int]]:
    """(name, scenario) to the mean over the points that all names of the scenario have, and how many these are."""
    found: dict[str, dict[str, dict[tuple[float, int], float]]] = defaultdict(lambda: defaultdict(dict))
    for row in rows:
        found[row["scenario"]][name(row)][point_of(row)] = row[value]
    means = {}
    for scenario, names in found.items():
        common = set.intersection(*(set(points) for points in names.values()))
        for one, points in names.items():
            if common:
                means[one, scenario] = fmean(points[p] for p in common), len(common)
    return means


def table(head: Sequence[str], lines: Iterable[Sequence[str]]) -> str:
    return "\n".join("| " + " | ".join(line) + " |" for line in (head, ["---"] * len(head), *lines))


def mean_table(rows: Sequence[Row], name: Callable[[Row], str], first: str, value: str = "attainment") -> str:
    """A line for each name, a column for each scenario and one for their mean; in percent."""
    means = common_means(rows, name, value)
    scenarios = list(dict.fromkeys(r["scenario"] for r in rows))
    lines = []
    for one in dict.fromkeys(map(name, rows)):
        cells = [means[one, s][0] if (one, s) in means else None for s in scenarios]
        whole = [fmean(c for c in cells if c is not None)] if None not in cells else [None]
        lines.append([one, *(_percent(c) for c in cells + (whole if len(scenarios) > 1 else []))])
    counts = [max((n for (_, s), (_, n) in means.items() if s == scenario), default=0) for scenario in scenarios]
    lines.append(["loads x seeds", *map(str, counts), *([""] if len(scenarios) > 1 else [])])
    return table([first, *scenarios, *(["mean"] if len(scenarios) > 1 else [])], lines)


def against_best(
    rows: Sequence[Row], engine: str = "lens", router: str = "prism"
) -> list[tuple[str, float, float, float, str]]:
    """(scenario, load, router's mean over seeds, the best other's, its name), over the seeds that all have."""
    found: dict[tuple[str, float], dict[str, dict[int, float]]] = defaultdict(lambda: defaultdict(dict))
    for row in rows:
        if row["engine"] == engine:
            found[row["scenario"], row["load"]][row["router"]][row["seed"]] = row["attainment"]
    points = []
    for (scenario, load), routers in found.items():
        if router not in routers or len(routers) < 2:
            continue
        seeds = set.intersection(*(set(values) for values in routers.values()))
        if not seeds:
            continue
        means = {one: fmean(values[s] for s in seeds) for one, values in routers.items()}
        best = max((one for one in means if one != router), key=lambda one: means[one])
        points.append((scenario, load, means[router], means[best], best))
    return points


def best_table(rows: Sequence[Row]) -> str:
    lines = [
        [scenario, f"{load:g}", _percent(mine), _percent(best), name, f"{100 * (mine - best):+.1f}"]
        for scenario, load, mine, best, name in against_best(rows)
    ]
    worse = sum(mine < best - _WORSE for _, _, mine, best, _ in against_best(rows))
    head = ["scenario", "load", "LENS + PRISM", "best other", "which", "points"]
    return table(head, lines) + f"\n\n{worse} of {len(lines)} points are more than one below the best other router."


def prefix_table(rows: Sequence[Row]) -> str:
    """With LENS engines, where prefixes are cached: hit rate and attainment of each router, by scenario."""
    mine = [r for r in rows if r["engine"] == "lens" and r["prefix_hit_rate"]]
    hits, met = (common_means(mine, lambda r: r["router"], v) for v in ("prefix_hit_rate", "attainment"))
    lines = []
    for scenario in dict.fromkeys(r["scenario"] for r in mine):
        aware = hits.get(("cache-aware", scenario), (None, 0))[0]
        for router in dict.fromkeys(r["router"] for r in mine if r["scenario"] == scenario):
            if (router, scenario) not in hits:
                continue
            hit = hits[router, scenario][0]
            share = "" if not aware else _percent(hit / aware)
            lines.append([scenario, router, _percent(hit), share, _percent(met[router, scenario][0])])
    return table(["scenario", "router", "prefix hits", "of cache-aware's", "attainment"], lines)


def plot(rows: Sequence[Row], path: Path) -> None:
    """Attainment against load, an axis a scenario and a line a system, FCFS dotted; means over seeds. Scenarios of one
    load are left out, unless there are no others."""
    from matplotlib.figure import Figure

    scenarios = list(dict.fromkeys(r["scenario"] for r in rows))
    scenarios = [s for s in scenarios if len({r["load"] for r in rows if r["scenario"] == s}) > 1] or scenarios
    figure = Figure(figsize=(3.6 * len(scenarios), 3.8), layout="constrained")
    axes = figure.subplots(1, len(scenarios), squeeze=False, sharey=True)[0]
    systems = list(dict.fromkeys(map(system_of, rows)))
    for axis, scenario in zip(axes, scenarios, strict=True):
        for i, system in enumerate(systems):
            mine = [r for r in rows if r["scenario"] == scenario and system_of(r) == system]
            loads = sorted({r["load"] for r in mine})
            shares = [100 * fmean(r["attainment"] for r in mine if r["load"] == load) for load in loads]
            prism = system.endswith("+ prism")
            style = "-" if system.startswith("LENS") else ":"
            axis.plot(
                loads, shares, style, marker="o", ms=3, lw=2.5 if prism else 1.0, color=f"C{i % 10}", label=system
            )
        axis.set_title(scenario, fontsize=10)
        axis.set_xlabel("load (1: capacity)")
        axis.set_ylim(0, 102)
        axis.grid(color="0.9")
    axes[0].set_ylabel("promises kept (%), simulated")
    figure.legend(*axes[0].get_legend_handles_labels(), loc="outside lower center", ncols=4, frameon=False, fontsize=8)
    figure.savefig(path, dpi=110)


def _percent(share: float | None) -> str:
    return "" if share is None else f"{100 * share:.1f}"


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("json", type=Path)
    parser.add_argument("--plot", type=Path)
    args = parser.parse_args(argv)
    rows = read(args.json)
    plain = [r for r in usual(rows) if not r["prefix_hit_rate"]]
    print("### Mean attainment (%)\n", mean_table(plain, system_of, "engine + router"), sep="\n")
    print("\n### PRISM and the best other router, LENS engines (%)\n", best_table(usual(rows)), sep="\n")
    if any(r["prefix_hit_rate"] for r in rows):
        print("\n### Shared prefixes, LENS engines (%)\n", prefix_table(usual(rows)), sep="\n")
    varied = {(r["scenario"], r["engine"], r["router"]) for r in rows if any(key in r for key in CONDITIONS)}
    mine = [r for r in rows if (r["scenario"], r["engine"], r["router"]) in varied]
    if mine:
        print("\n### Under other conditions (%)\n")
        print(mean_table(mine, lambda r: f"{system_of(r)}, {condition_of(r)}", "what"))
    if args.plot:
        args.plot.parent.mkdir(parents=True, exist_ok=True)
        plot(plain, args.plot)


if __name__ == "__main__":
    main()
