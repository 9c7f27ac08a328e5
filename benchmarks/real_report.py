"""What benchmarks/real.py computes from its runs: promises, rates, medians, goodput, tables. Pure.

A run is a dict: `noise` (quiet, busy), `layout` (devices), `system`, `load` (rate over capacity), `rate_rps`, `round`,
and the figures of loadgen.report.summary.
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from nexusengine.loadgen.items import WorkItem
from nexusengine.loadgen.record import Record
from nexusengine.types import SLO

Run = dict[str, Any]
TARGET = 0.9
"""Goodput is the highest rate at which this share of all requests keeps its promise."""


@dataclass(frozen=True, slots=True)
class Idle:
    """Latencies of an idle server: the TTFT of a short and a long prompt, and the TPOT of a request alone.

    Attributes:
        short_tokens, long_tokens: of the prompts.
    """

    short_tokens: int
    short_ttft_s: float
    long_tokens: int
    long_ttft_s: float
    tpot_s: float


@dataclass(frozen=True, slots=True)
class Promise:
    """TTFT within ttft_s, and ttft_per_token_s more for each prompt token beyond short_tokens; TPOT within tpot_s."""

    short_tokens: int
    ttft_s: float
    ttft_per_token_s: float
    tpot_s: float

    def slo(self, prompt_tokens: int) -> SLO:
        beyond = max(prompt_tokens - self.short_tokens, 0)
        return SLO(self.ttft_s + beyond * self.ttft_per_token_s, self.tpot_s)


def promise_of(idle: Idle, ttft_factor: float, tpot_factor: float) -> Promise:
    """The idle latencies times the factors; TTFT is a straight line through the two prompts, never falling."""
    slope = max((idle.long_ttft_s - idle.short_ttft_s) / (idle.long_tokens - idle.short_tokens), 0.0)
    return Promise(idle.short_tokens, ttft_factor * idle.short_ttft_s, ttft_factor * slope, tpot_factor * idle.tpot_s)


def promised(items: Sequence[WorkItem], promise: Promise) -> list[WorkItem]:
    """The items with the SLO of the promise, by number and without a class."""
    return [
        WorkItem(i.send_at_s, i.prompt_tokens, i.output_tokens, promise.slo(i.prompt_tokens), None, i.blocks)
        for i in items
    ]


def unpromised(items: Sequence[WorkItem]) -> list[WorkItem]:
    """The items as they are sent to a server that is told no SLO."""
    return [WorkItem(i.send_at_s, i.prompt_tokens, i.output_tokens, None, None, i.blocks) for i in items]


def judge_by(records: Sequence[Record], items: Sequence[WorkItem]) -> None:
    """Have the records judged by the SLOs of `items`, whatever the server was told."""
    for record, item in zip(records, items, strict=True):
        record.item = item


def ended_rps(ended_s: Sequence[float]) -> float:
    """Of a crowd: ends a second, without the beginning, when nothing can have ended, and the end, when little runs."""
    order = sorted(ended_s)
    first, last = int(0.15 * len(order)), int(0.85 * len(order))
    return (last - first) / (order[last] - order[first])


# ---- summaries ------------------------------------------------------------------------------------------------------


def summary_of(runs: Sequence[Run]) -> list[dict[str, Any]]:
    """A row for each noise, layout, system and load: medians over rounds. In order of first appearance."""
    groups: dict[tuple[str, str, str, float], list[Run]] = {}
    for run in runs:
        groups.setdefault((run["noise"], run["layout"], run["system"], run["load"]), []).append(run)
    return [
        {
            "noise": noise,
            "layout": layout,
            "system": system,
            "load": load,
            "rounds": len(of),
            "requests": sum(r["offered"] for r in of),
            "rate_rps": statistics.median(r["rate_rps"] for r in of),
            "attainment": statistics.median(r["attainment"] for r in of),
            "attainment_least": min(r["attainment"] for r in of),
            "attainment_most": max(r["attainment"] for r in of),
            "completed": statistics.median(r["completed"] / r["offered"] for r in of),
            "output_tokens_per_s": statistics.median(r["output_tokens_per_s"] for r in of),
            **{f"{key}_{p}": _median(r[key][p] for r in of) for key in ("ttft_ms", "tpot_ms") for p in ("p50", "p99")},
        }
        for (noise, layout, system, load), of in groups.items()
    ]


def _median(values: Any) -> float | None:
    """Of the numbers among them; None where there is none."""
    found = [v for v in values if v is not None and math.isfinite(v)]
    return statistics.median(found) if found else None


def goodput_rps(points: Sequence[tuple[float, float]], target: float = TARGET) -> float | None:
    """The highest rate at which the target is met, between measured rates on a straight line.

    Args:
        points: (rate, attainment), in any order.
        target: share of requests.

    Returns:
        None if it is missed at every rate. The highest measured rate if it is met there: a lower bound.
    """
    order = sorted(points)
    for i in range(len(order) - 1, -1, -1):
        rate, share = order[i]
        if share >= target:
            if i + 1 == len(order):
                return rate
            above, missed = order[i + 1]
            return rate + (above - rate) * (share - target) / (share - missed)
    return None


def goodputs(summary: Sequence[dict[str, Any]]) -> dict[tuple[str, str, str], float | None]:
    """By noise, layout and system."""
    points: dict[tuple[str, str, str], list[tuple[float, float]]] = {}
    for row in summary:
        key = (row["noise"], row["layout"], row["system"])
        points.setdefault(key, []).append((row["rate_rps"], row["attainment"]))
    return {key: goodput_rps(of) for key, of in points.items()}


# ---- tables ---------------------------------------------------------------------------------------------------------


def tables(result: dict[str, Any]) -> str:
    """The whole result in Markdown: how it was made, a table for each noise and layout, and the goodputs."""
    return "\n\n".join([_made(result), *_by_condition(result["summary"]), _goodput_table(result["summary"])]) + "\n"


def _made(result: dict[str, Any]) -> str:
    machine, promise, versions, settings = (result[k] for k in ("machine", "promise", "versions", "settings"))
    loads = dict.fromkeys(row["load"] for row in result["summary"])
    capacity = ", ".join(f"{noise} {rps:.2f}" for noise, rps in result["capacity_rps"].items())
    return (
        f"{result['date']}, {machine['cpu']}, {machine['cores']} cores; nexusengine {versions['nexusengine']}, "
        f"llama-server {versions['llama-server']} with {settings['llama_settings']}; weights {settings['weights']}; "
        f"lengths divided by {settings['scale']:g}. Promise: TTFT {1e3 * promise['ttft_s']:.0f} ms, "
        f"{1e3 * promise['ttft_per_token_s']:.2f} ms more for each prompt token beyond {promise['short_tokens']}; "
        f"TPOT {1e3 * promise['tpot_s']:.1f} ms. "
        f"{settings['rounds']} rounds of {settings['duration']:.0f} s at {', '.join(f'{load:g}' for load in loads)} of "
        f"the capacity ({capacity} requests a second); took {result['took_s'] / 60:.0f} minutes."
    )


def _by_condition(summary: Sequence[dict[str, Any]]) -> list[str]:
    conditions = dict.fromkeys((row["noise"], row["layout"]) for row in summary if row["layout"])
    found = []
    for noise, layout in conditions:
        rows = [r for r in summary if r["noise"] == noise and r["layout"] in (layout, "")]
        rows.sort(key=lambda r: (r["load"], not r["layout"], r["system"]))
        head = (
            "| system | load | requests | kept % | least..most | TTFT p50 / p99, ms | TPOT p50 / p99, ms | tokens/s |"
        )
        lines = [f"**{noise}, {layout}**", "", head, "|---|---|---|---|---|---|---|---|"]
        lines += [_row(row) for row in rows]
        found.append("\n".join(lines))
    return found


def _row(row: dict[str, Any]) -> str:
    spread = f"{100 * row['attainment_least']:.0f}..{100 * row['attainment_most']:.0f}"
    latencies = [f"{_ms(row[f'{k}_p50'])} / {_ms(row[f'{k}_p99'])}" for k in ("ttft_ms", "tpot_ms")]
    cells = [row["system"], f"{row['load']:g} ({row['rate_rps']:.2f}/s)", row["requests"]]
    cells += [f"{100 * row['attainment']:.1f}", spread, *latencies, f"{row['output_tokens_per_s']:.1f}"]
    return "| " + " | ".join(map(str, cells)) + " |"


def _ms(value: float | None) -> str:
    return "-" if value is None else f"{value:.0f}"


def _goodput_table(summary: Sequence[dict[str, Any]]) -> str:
    found = goodputs(summary)
    highest = {(r["noise"], r["layout"], r["system"]): 0.0 for r in summary}
    lowest = dict.fromkeys(highest, math.inf)
    for r in summary:
        key = (r["noise"], r["layout"], r["system"])
        highest[key], lowest[key] = max(highest[key], r["rate_rps"]), min(lowest[key], r["rate_rps"])
    lines = [
        f"**Goodput**: requests a second at which {100 * TARGET:.0f} % of promises are kept",
        "",
        "| noise | layout | system | goodput |",
        "|---|---|---|---|",
    ]
    for key, value in found.items():
        if value is None:
            shown = f"< {lowest[key]:.2f}"
        else:
            shown = f">= {value:.2f}" if value == highest[key] else f"{value:.2f}"
        lines.append(f"| {key[0]} | {key[1] or 'any'} | {key[2]} | {shown} |")
    return "\n".join(lines)


BEGIN, END = "<!-- figures begin -->", "<!-- figures end -->"


def filled(page: str, figures: str) -> str:
    """The page with the figures between its two marks. Raises ValueError if they are not there."""
    before, begin, rest = page.partition(BEGIN)
    _, end, after = rest.partition(END)
    if not begin or not end:
        raise ValueError(f"the page has no place for figures: {BEGIN} ... {END}")
    return f"{before}{BEGIN}\n\n{figures.strip()}\n\n{END}{after}"
