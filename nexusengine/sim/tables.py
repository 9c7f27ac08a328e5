"""Results as tables on a terminal."""

from __future__ import annotations

import sys
from collections.abc import Callable, Sequence
from statistics import fmean
from typing import Any

from rich.console import Console
from rich.table import Table

from nexusengine.sim.api import SimResult
from nexusengine.sim.goodput import Goodput
from nexusengine.sim.plan import RANKS, Plan
from nexusengine.sim.sweep import Point

_WIDTH = 140


def print_run(result: SimResult) -> None:
    m, console = result.metrics, _console()
    summary = Table(title=f"{result.spec.engine} + {result.spec.router} on {result.spec.devices}", show_header=False)
    missed = ", ".join(f"{count} {why}" for why, count in sorted(m["missed"].items())) or "none"
    for name, value in (
        ("offered", f"{m['offered']} ({_number(m['offered_rps'])}/s)"),
        ("completed", m["completed"]),
        ("attainment", _percent(m["attainment"])),
        ("  each token in time", _percent(m["attainment_strict"])),
        ("  longest tenth of prompts", _percent(m["attainment_longest_decile"])),
        ("  weighted by tokens", _percent(m["attainment_token_weighted"])),
        *((f"  {name}", _percent(share)) for name, share in m["attainment_by_class"].items()),
        ("missed", missed),
        ("output tokens/s", _number(m["output_tokens_per_s"])),
        ("worst wait", f"{_number(m['worst_wait_s'])} s"),
        ("preemptions, relegated", f"{m['preemptions']}, {m['relegated']}"),
        ("prefix hits", _percent(m["prefix_hit_rate"])),
        ("scheduler, median and p99", f"{_number(m['scheduler_ms_p50'])}, {_number(m['scheduler_ms_p99'])} ms"),
        ("router, median and p99", f"{_number(m['router_ms_p50'])}, {_number(m['router_ms_p99'])} ms"),
        *((name.replace("_", " "), str(value)) for name, value in m["workload"].items() if name.endswith("clipped")),
    ):
        summary.add_row(name, str(value))
    console.print(summary)
    latency = Table("ms", "mean", "p50", "p90", "p99")
    for name in ("ttft_ms", "tpot_ms", "e2e_ms"):
        latency.add_row(name.removesuffix("_ms"), *(_number(m[name][k]) for k in ("mean", "p50", "p90", "p99")))
    console.print(latency)
    workers = Table("worker", "device", "completed", "busy", "steps", "KV peak", "prediction error", "coverage")
    for w in m["workers"]:
        workers.add_row(
            w["worker"],
            w["device"],
            str(w["completed"]),
            _percent(w["busy"]),
            str(w["steps"]),
            _percent(w["kv_peak"]),
            _percent(w["prediction_error"]),
            _percent(w["coverage"]),
        )
    console.print(workers)


def _console() -> Console:
    """As wide as the terminal; wide enough for every column where there is none."""
    return Console(width=None if sys.stdout.isatty() else _WIDTH)


def print_ranges(ranges: dict[str, Any]) -> None:
    """What `sim.ranges.ranges` found."""
    table = Table("lowest and highest of five simulations", "", "mean", "p50", "p90", "p99")
    for name, found in ranges.items():
        if isinstance(found, dict):
            table.add_row(name, "", *(_span(found[key], _number) for key in ("mean", "p50", "p90", "p99")))
        else:
            table.add_row(name, _span(found, _percent if name.startswith("attainment") else _number))
    _console().print(table)


def _span(found: Sequence[float] | None, text: Callable[[float], str]) -> str:
    return "-" if found is None else " to ".join(text(value) for value in found)


def print_points(points: Sequence[Point]) -> None:
    """Means over seeds."""
    table = Table(
        "engine", "router", "rate/s", "attainment", "strict", "longest tenth", "TTFT p50", "p99", "TPOT p50", "p99"
    )
    groups: dict[tuple[str, str, float], list[dict[str, Any]]] = {}
    for p in points:
        groups.setdefault((p.engine, p.router, p.rate_rps), []).append(p.metrics)
    for (engine, router, rate), metrics in groups.items():
        table.add_row(
            engine,
            router,
            _number(rate),
            *(
                _percent(fmean(m[k] for m in metrics))
                for k in ("attainment", "attainment_strict", "attainment_longest_decile")
            ),
            *(
                _number(fmean(m[k][q] if m[k][q] is not None else float("nan") for m in metrics))
                for k in ("ttft_ms", "tpot_ms")
                for q in ("p50", "p99")
            ),
        )
    _console().print(table)


def print_goodput(found: Goodput, target: float, longest_decile: float) -> None:
    console = _console()
    table = Table("rate/s", "attainment", "longest tenth", "holds")
    for t in sorted(found.tried, key=lambda t: t.rate_rps):
        at_most = "< " if t.cut_short else ""
        table.add_row(
            _number(t.rate_rps),
            at_most + _percent(t.attainment),
            at_most + _percent(t.longest_decile),
            "yes" if t.holds else "no",
        )
    console.print(table)
    console.print(
        f"goodput {_number(found.rate_rps)} requests/s with {_percent(target)} of all requests and "
        f"{_percent(longest_decile)} of the longest tenth in time"
    )


def print_plan(plan: Plan) -> None:
    console = _console()
    searched = any(rate is not None for c in plan.candidates for rate in c.goodput_rps)
    highest = [name for t in plan.targets if searched for name in (f"rate at {100 * t:g} %", "head-room")]
    table = Table("devices", *RANKS.values(), "attainment", "longest tenth", *highest, "first bottleneck")
    for c in plan.candidates:
        cells = []
        for rate in c.goodput_rps if searched else ():
            cells += [_number(rate), "-" if rate is None else _percent(rate / plan.rate_rps - 1.0)]
        costs = [_cost(c.rank(by), by) for by in RANKS]
        shares = _percent(c.attainment), _percent(c.longest_decile)
        table.add_row(_mix(c.devices), *costs, *shares, *cells, c.bottleneck)
    console.print(f"offered: {_number(plan.rate_rps)} requests/s")
    console.print(table)
    missing = "watts" if plan.rank == "energy" else "prices"
    for target in plan.targets:
        best = plan.cheapest(target)
        served = [c for c in plan.candidates if c.serves(target, plan.longest_decile)]
        if best is not None:
            told = _cost(best.rank(plan.rank), plan.rank)
            console.print(f"{100 * target:g} %: cheapest is {_mix(best.devices)}, {told} {RANKS[plan.rank]}")
        else:
            console.print(
                f"{100 * target:g} %: {f'{missing} are missing' if served else 'no candidate serves this load'}"
            )


def _cost(value: float | None, by: str) -> str:
    return "?" if value is None else f"{value:.2f}" if by == "price" else _number(value)


def print_comparison(found: dict[str, Any]) -> None:
    """See sim.compare."""
    recorded, simulated, off = found["recorded"], found["simulated"], found["difference"]
    table = Table("", "recorded", "simulated", "difference")

    def share(name: str, was: float | None, says: float | None, points: float | None) -> None:
        table.add_row(name, _percent(was), _percent(says), "-" if points is None else f"{points:+.1f} points")

    def number(name: str, was: float | None, says: float | None, percent: float | None) -> None:
        table.add_row(name, _number(was), _number(says), "-" if percent is None else f"{percent:+.1f} %")

    share("attainment", recorded["attainment"], simulated["attainment"], off["attainment_points"])
    for name, points in off["attainment_by_class_points"].items():
        share(f"  {name}", recorded["attainment_by_class"][name], simulated["attainment_by_class"][name], points)
    for name in ("completed", "refused"):
        table.add_row(name, _number(recorded[name]), _number(simulated[name]), f"{off[name]:+.4g}")
    for key in ("ttft", "tpot", "e2e"):
        for q in ("mean", "p50", "p90", "p99"):
            was, says = recorded[f"{key}_ms"][q], simulated[f"{key}_ms"][q]
            number(f"{key.upper() if key != 'e2e' else 'end to end'} {q}, ms", was, says, off[f"{key}_percent"][q])
    rate = "output_tokens_per_s"
    number("output tokens/s", recorded[rate], simulated[rate], off[f"{rate}_percent"])
    for name, more in off["by_worker"].items():
        counts = recorded["by_worker"].get(name, 0), simulated["by_worker"].get(name, 0)
        table.add_row(f"answered by {name}", *map(_number, counts), f"{more:+.4g}")
    console, left, assumed = _console(), found["left_out"], found["assumed"]
    slowness = assumed["slowness_over_time"]
    console.print(table)
    console.print(
        f"{found['requests']} requests; left out: {left['client_went_away']} whose client went away, "
        f"{left['turned_away_unread']} turned away before their prompt was read"
    )
    ranges = found["range_over_seeds"]
    low, high = ranges["attainment"]
    console.print(f"simulated, lowest to highest of the seeds: attainment {_percent(low)} to {_percent(high)}")
    console.print(
        f"assumed: {_number(assumed['between_steps_ms'])} ms between steps, {_number(assumed['link_delay_ms'])} ms a "
        "message"
        + ("" if slowness is None else f", devices {slowness[0]:.2f} to {slowness[1]:.2f} times as slow as on average")
    )


def _mix(devices: str) -> str:
    """As one writes it among candidates."""
    return devices.replace(",", "+")


def _number(value: float | None) -> str:
    return "-" if value is None else f"{value:.4g}"


def _percent(value: float | None) -> str:
    return "-" if value is None else f"{100 * value:.1f} %"
