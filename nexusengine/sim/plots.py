"""Plots of simulations as PNG files. matplotlib is an extra: `pip install 'nexusengine[plot]'`."""

from __future__ import annotations

import importlib.util
from collections.abc import Sequence
from typing import Any

import numpy as np

from nexusengine.errors import ConfigError
from nexusengine.sim.api import SimResult
from nexusengine.sim.goodput import Goodput
from nexusengine.sim.plan import Plan
from nexusengine.sim.sweep import Point
from nexusengine.sim.verdicts import Table, tabulate

_DPI = 120
_GRID = {"color": "0.9", "linewidth": 0.8}
_ROOM = 1.15  # for labels at the edges


def require_matplotlib() -> None:
    """Before a long simulation rather than after it. Raises ConfigError."""
    if importlib.util.find_spec("matplotlib") is None:
        raise ConfigError("--plot needs matplotlib: pip install 'nexusengine[plot]'", param="plot")


def plot_run(result: SimResult, path: str) -> None:
    """CDFs of TTFT and TPOT by class, and the load over time: requests in the engines, KV in use."""
    figure, axes = _figure(2, 2, (11, 7.5))
    table = tabulate(result.outcomes, result.metrics["simulated_s"])
    _cdf(axes[0][0], table, table.ttft_s, "TTFT (s)", logarithmic=True)
    _cdf(axes[0][1], table, 1e3 * table.tpot_s, "TPOT (ms)", logarithmic=False)
    _load(axes[1][0], result)
    _kv(axes[1][1], result)
    m, spec = result.metrics, result.spec
    figure.suptitle(
        f"{spec.engine} + {spec.router} on {spec.devices}, {m['offered_rps']:.3g} requests/s: "
        f"{100 * m['attainment']:.1f} % in time"
    )
    _save(figure, path)


def plot_sweep(points: Sequence[Point], path: str) -> None:
    """Attainment against offered rate, one line a pair of policies; the longest tenth of prompts beside it."""
    figure, axes = _figure(1, 2, (12, 4.8))
    names = list(dict.fromkeys((p.engine, p.router) for p in points))
    one_router = len({router for _, router in names}) == 1
    for engine, router in names:
        label = engine if one_router else f"{engine} + {router}"
        mine = [p for p in points if (p.engine, p.router) == (engine, router)]
        rates = sorted({p.rate_rps for p in mine})
        for axis, key in zip(axes[0], ("attainment", "attainment_longest_decile"), strict=True):
            shares = [np.mean([p.metrics[key] for p in mine if p.rate_rps == r]) for r in rates]
            axis.plot(rates, 100 * np.array(shares), marker="o", markersize=4, label=label)
    for axis, title in zip(axes[0], ("all requests", "longest tenth of prompts"), strict=True):
        _attainment_axis(axis, title)
    axes[0][0].axhline(90, color="0.5", linewidth=1, linestyle="--")
    axes[0][0].legend(frameon=False)
    _save(figure, path)


def plot_tried(found: Goodput, target: float, longest_decile: float, path: str) -> None:
    """Attainment at the rates that a search tried; those that were cut short are upper bounds, drawn hollow."""
    figure, axes = _figure(1, 1, (6.5, 4.8))
    axis = axes[0][0]
    tried = sorted(found.tried, key=lambda t: t.rate_rps)
    rates = np.array([t.rate_rps for t in tried])
    whole = np.array([not t.cut_short for t in tried])
    for color, label, shares, needed in (
        ("C0", "all requests", [t.attainment for t in tried], target),
        ("C1", "longest tenth of prompts", [t.longest_decile for t in tried], longest_decile),
    ):
        percent = 100 * np.array(shares)
        axis.plot(rates, percent, color=color, linewidth=1)
        axis.plot(rates[whole], percent[whole], "o", color=color, label=label)
        axis.plot(rates[~whole], percent[~whole], "o", color=color, markerfacecolor="white")
        axis.axhline(100 * needed, color=color, linewidth=1, linestyle="--")
    if found.rate_rps > 0:
        axis.axvline(found.rate_rps, color="0.5", linewidth=1)
    _attainment_axis(axis, f"goodput {found.rate_rps:.3g} requests/s")
    axis.legend(frameon=False)
    _save(figure, path)


def plot_plan(plan: Plan, path: str) -> None:
    """Plot the highest rate at each target against cost an hour.

    A bar from target to target for each candidate; those whose price is not known stand at 0. Where no rates were
    searched for: attainment at the offered rate.
    """
    figure, axes = _figure(1, 1, (7.5, 5.0))
    axis = axes[0][0]
    cost = [c.price_per_hour or 0.0 for c in plan.candidates]
    searched = any(rate is not None for c in plan.candidates for rate in c.goodput_rps)
    if searched:
        rates = [[rate or 0.0 for rate in c.goodput_rps] for c in plan.candidates]
        axis.vlines(cost, [min(r) for r in rates], [max(r) for r in rates], color="0.7", linewidth=3, zorder=1)
        for i, target in enumerate(plan.targets):
            label = f"{100 * target:g} % of promises kept"
            axis.plot(cost, [r[i] for r in rates], "o", color=f"C{i}", label=label)
        axis.axhline(plan.rate_rps, color="0.5", linewidth=1, linestyle="--", label=f"offered: {plan.rate_rps:.3g}/s")
        axis.set_ylabel("highest rate (requests/s)")
        heights = [max(r) for r in rates]
    else:
        heights = [100 * c.attainment for c in plan.candidates]
        axis.plot(cost, heights, "o", label=f"at the offered {plan.rate_rps:.3g} requests/s")
        axis.set_ylabel("attainment (%)")
    for c, x, y in zip(plan.candidates, cost, heights, strict=True):
        name = c.devices.replace(",", " + ") + ("" if c.price_per_hour is not None else " (no price)")
        axis.annotate(name, (x, y), textcoords="offset points", xytext=(0, 7), ha="center", fontsize=8)
    axis.set_xlabel("cost ($/h)")
    axis.set_xlim(0, _ROOM * max(cost) or 1.0)
    axis.set_ylim(0, _ROOM * max(*heights, plan.rate_rps if searched else 0.0))
    axis.set_title(f"simulated, {plan.rate_rps:.3g} requests/s offered", fontsize=10)
    axis.grid(**_GRID)
    axis.legend(frameon=False, loc="upper left")
    _save(figure, path)


def _figure(rows: int, columns: int, size: tuple[float, float]) -> tuple[Any, Any]:
    require_matplotlib()
    from matplotlib.figure import Figure

    figure = Figure(figsize=size, layout="constrained")
    return figure, figure.subplots(rows, columns, squeeze=False)


def _save(figure: Any, path: str) -> None:
    try:
        figure.savefig(path, dpi=_DPI)
    except (OSError, ValueError) as error:
        raise ConfigError(f"cannot write the plot {path}: {error}", param="plot") from None


def _attainment_axis(axis: Any, title: str) -> None:
    axis.set_title(title, fontsize=10)
    axis.set_xlabel("offered requests/s")
    axis.set_ylabel("attainment (%)")
    axis.set_ylim(-2, 102)
    axis.set_xlim(left=0)
    axis.grid(**_GRID)


def _cdf(axis: Any, table: Table, values: np.ndarray, label: str, *, logarithmic: bool) -> None:
    """Shares of all offered requests of a class, so that a curve of a class with losses ends below 100 %."""
    names = np.array(table.slo_class)
    for name in sorted(set(table.slo_class)):
        mine = np.sort(values[names == name])
        mine = mine[~np.isnan(mine)]
        axis.step(mine, 100 * np.arange(1, len(mine) + 1) / (names == name).sum(), where="post", label=name)
    if logarithmic:
        from matplotlib.ticker import LogLocator, NullFormatter, StrMethodFormatter

        axis.set_xscale("log")
        axis.xaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
        axis.xaxis.set_major_formatter(StrMethodFormatter("{x:g}"))
        axis.xaxis.set_minor_formatter(NullFormatter())
    else:
        axis.set_xlim(left=0)
    axis.set_ylim(0, 102)
    axis.set_xlabel(label)
    axis.set_ylabel("requests (%)")
    axis.grid(**_GRID)
    axis.legend(frameon=False, loc="lower right")


def _load(axis: Any, result: SimResult) -> None:
    at_s = [s.at_s for s in result.timeline]
    for i, worker in enumerate(result.metrics["workers"]):
        label = f"{worker['worker']} {worker['device']}"
        axis.plot(at_s, [s.running[i] for s in result.timeline], color=f"C{i % 10}", linewidth=1, label=label)
        waiting = [s.waiting[i] for s in result.timeline]
        axis.plot(at_s, waiting, color=f"C{i % 10}", linewidth=1, linestyle=":")
    held = [s.held for s in result.timeline]
    if any(held):
        axis.plot(at_s, held, color="0.4", linewidth=1, label="held by the router")
    axis.set_xlabel("time (s)")
    axis.set_ylabel("requests running (dotted: waiting)")
    axis.set_ylim(bottom=0)
    axis.grid(**_GRID)
    if len(result.metrics["workers"]) <= 8:
        axis.legend(frameon=False, fontsize=8, ncols=4, loc="lower left", bbox_to_anchor=(0, 1))


def _kv(axis: Any, result: SimResult) -> None:
    at_s = [s.at_s for s in result.timeline]
    for i in range(len(result.metrics["workers"])):
        axis.plot(at_s, [100 * s.kv[i] for s in result.timeline], color=f"C{i % 10}", linewidth=1)
    axis.set_xlabel("time (s)")
    axis.set_ylabel("KV cache in use (%)")
    axis.set_ylim(bottom=0)
    axis.grid(**_GRID)
