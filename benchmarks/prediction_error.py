"""How far are the times to first token that a server foretells from those that it then measures?

    python benchmarks/prediction_error.py [--devices cpu:1,cpu:2] [--neighbours 0,2] [--rounds 3] [--output FILE.json]

SmolLM2-135M behind `nexusengine serve`, a fresh server for each round of each device and number of neighbours
(processes that do nothing but keep a core busy). Every server gets the same parts, each with the names of its loads:

    first    the first requests after the start, one by one
    alone    one request at a time, prompts of 20 to 600 tokens
    burst    4, 8 and 16 requests at once
    poisson  open-loop arrivals at about 30, 60 and 90 % of the rate that the bursts were served at

but for `first` without an SLO and with the mixed classes. The server's word on each request (`nexus` in its reply) has
both times. The error is |predicted - measured| / measured; requests of which nothing was foretold are not in it, and
`told` is the share of the others. `unattainable` counts promises that the server called out of reach, `wrongly` those
of them that were kept all the same.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import time
from collections import defaultdict
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from nexusengine.loadgen.http import Target
from nexusengine.loadgen.items import WorkItem, items_of
from nexusengine.loadgen.record import Record
from nexusengine.loadgen.run import offer
from nexusengine.loadgen.server import ServerInfo, ask, own_server
from nexusengine.process.parent_death import set_parent_death_signal
from nexusengine.sim.workload.build import Builder, WorkloadSpec

ALONE = (20, 40, 60, 100, 150, 200, 300, 400, 500, 600)
FIRST = (60, 300, 20, 600, 100, 200)
BURSTS = (4, 8, 16)
LOADS = (0.3, 0.6, 0.9)
PROMISES = ("none", "mixed")
CLASSES = ("interactive", "standard", "batch")
LENGTHS = "input=logn:120:200,output=exp:40"
MEDIAN_GOAL, P90_GOAL = 0.15, 0.50
_OUTPUT_TOKENS = 24
_LEAST_POISSON = 12

Row = dict[str, Any]


def main(argv: Sequence[str] | None = None) -> int:
    args = _arguments().parse_args(argv)
    rows: list[Row] = []
    for number in range(args.rounds):
        for devices in args.devices.split(","):
            for neighbours in map(int, args.neighbours.split(",")):
                of_server = {"round": number, "devices": devices, "neighbours": neighbours}
                with busy(neighbours):
                    rows += [of_server | row for row in _measure(args, devices, args.seed + number)]
                _say(table([r for r in rows if of_server.items() <= r.items()]))
                if args.output:
                    _write(args, rows)
    print(table(rows))
    return 0


def _arguments() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--devices", default="cpu:1,cpu:2", help="one server each")
    parser.add_argument("--neighbours", default="0,2", help="how many processes keep a core busy, for each a server")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--duration", type=float, default=20.0, help="seconds of arrivals at each rate")
    parser.add_argument("--scheduler", default="lens")
    parser.add_argument("--model", help="as of nexusengine serve")
    parser.add_argument("--parts", default="first,alone,burst,poisson")
    parser.add_argument("--seed", type=int, default=0, help="of the first round; each round has the next")
    parser.add_argument("--output", help="write every request as JSON")
    return parser


@contextmanager
def busy(count: int) -> Iterator[None]:
    """So many processes that keep a core busy."""
    spin = [sys.executable, "-c", "while True: pass"]
    end_with_us = partial(set_parent_death_signal, 9)
    processes = [subprocess.Popen(spin, preexec_fn=end_with_us) for _ in range(count)]
    try:
        yield
    finally:
        for process in processes:
            process.kill()
            process.wait()


# ---- figures --------------------------------------------------------------------------------------------------------


def row_of(record: Record) -> Row | None:
    """What the server said of a request; None if it failed."""
    told = record.nexus
    if not record.completed or told is None or told["ttft_ms"] is None:
        return None
    keys = ("predicted_ttft_ms", "ttft_ms", "queue_ms", "cached_tokens", "worker", "unattainable", "met", "missed")
    return {"prompt_tokens": record.item.prompt_tokens, **{key: told[key] for key in keys}}


def figures(rows: Sequence[Row]) -> dict[str, float]:
    """Of some requests. NaN where nothing was foretold."""
    told = [r for r in rows if r["predicted_ttft_ms"] is not None]
    off = np.array([r["predicted_ttft_ms"] / r["ttft_ms"] - 1.0 for r in told])
    unattainable = [r for r in rows if r["unattainable"]]
    nothing = not len(off)
    return {
        "requests": len(rows),
        "told": len(told) / max(len(rows), 1),
        "median": np.nan if nothing else float(np.median(np.abs(off))),
        "p90": np.nan if nothing else float(np.percentile(np.abs(off), 90)),
        "worst": np.nan if nothing else float(np.abs(off).max()),
        "bias": np.nan if nothing else float(np.median(off)),
        "unattainable": len(unattainable),
        "wrongly": sum(r["met"] is True for r in unattainable),
    }


def table(rows: Sequence[Row]) -> str:
    """A line for each device, number of neighbours and load, and one for all loads of a server."""
    parts: dict[tuple[str, int, str], list[Row]] = defaultdict(list)
    for row in rows:
        server = row["devices"], row["neighbours"]
        parts[*server, row["load"]].append(row)
        parts[*server, "ALL"].append(row)
    head = f"{'devices':<12}{'neighbours':>10}  {'load':<16}{'requests':>9}{'told':>7}{'median':>8}{'p90':>8}"
    lines = [f"{head}{'worst':>8}{'bias':>8}{'unattainable':>14}{'wrongly':>9}"]
    for (devices, neighbours, load), mine in sorted(parts.items(), key=lambda p: (p[0][:2], p[0][2] == "ALL")):
        f = figures(mine)
        shares = "".join(f"{100 * f[k]:>7.0f}%" for k in ("median", "p90", "worst", "bias"))
        lines.append(
            f"{devices:<12}{neighbours:>10}  {load:<16}{len(mine):>9}{100 * f['told']:>6.0f}%{shares}"
            f"{f['unattainable']:>14.0f}{f['wrongly']:>9.0f}" + (_judged(f) if load == "ALL" else "")
        )
    return "\n".join(lines)


def _judged(f: dict[str, float]) -> str:
    good = f["median"] <= MEDIAN_GOAL and f["p90"] <= P90_GOAL
    return "  within the goal" if good else "  beyond the goal"


def _write(args: argparse.Namespace, rows: Sequence[Row]) -> None:
    made = {"options": vars(args), "rows": rows}
    Path(args.output).write_text(json.dumps(made, indent=1) + "\n")


# ---- measuring ------------------------------------------------------------------------------------------------------


def _measure(args: argparse.Namespace, devices: str, seed: int) -> list[Row]:
    """The rows of one server."""
    wanted = args.parts.split(",")
    options = ["--devices", devices.replace("+", ","), "--scheduler", args.scheduler, "--log-level", "warning"]
    if args.model:
        options += ["--model", args.model]
    rows: list[Row] = []
    with own_server([*options, "--nexus-verdict"]) as url:
        load = _Load(Target(url), ask(url), seed)
        if "first" in wanted:
            for tokens in FIRST:
                rows += load.offer("first", [WorkItem(0.0, tokens, _OUTPUT_TOKENS)])
        for promise in PROMISES:
            if "alone" in wanted:
                for i, tokens in enumerate(ALONE):
                    rows += load.offer(f"alone {promise}", [_item(i, tokens, promise)])
            rate_rps = 0.0
            for count in BURSTS if {"burst", "poisson"} & {*wanted} else ():
                items = [_item(i, ALONE[i % len(ALONE)], promise) for i in range(count)]
                began_s = time.monotonic()
                found = load.offer(f"burst {count} {promise}", items)
                rate_rps = len(found) / (time.monotonic() - began_s)
                rows += found if "burst" in wanted else []
            for share in LOADS if "poisson" in wanted else ():
                items = _poisson(share * rate_rps, args.duration, promise, seed)
                rows += load.offer(f"poisson {share:.0%} {promise}", items)
    return rows


class _Load:
    """What is offered to one server; every prompt is a new one."""

    def __init__(self, target: Target, info: ServerInfo, seed: int) -> None:
        self._target, self._info, self._seed = target, info, 1000 * seed

    def offer(self, load: str, items: Sequence[WorkItem]) -> list[Row]:
        self._seed += 1
        records = offer(self._target, items, self._info, seed=self._seed).records
        return [{"load": load, **row} for row in map(row_of, records) if row is not None]


def _item(i: int, tokens: int, promise: str) -> WorkItem:
    """The i-th request of a load, due at once."""
    return WorkItem(0.0, tokens, _OUTPUT_TOKENS, slo_class=None if promise == "none" else CLASSES[i % len(CLASSES)])


def _poisson(rate_rps: float, duration_s: float, promise: str, seed: int) -> list[WorkItem]:
    spec = WorkloadSpec(
        trace=f"lengths:{LENGTHS}",
        arrivals="poisson",
        rate_rps=rate_rps,
        duration_s=max(duration_s, _LEAST_POISSON / rate_rps),
        classes="mixed",
        seed=seed,
        max_tokens=2048,
    )
    items = items_of(Builder(spec).build())
    return items if promise == "mixed" else [replace(item, slo=None, slo_class=None) for item in items]


def _say(text: str) -> None:
    print(text, file=sys.stderr, flush=True)


if __name__ == "__main__":
    sys.exit(main())
