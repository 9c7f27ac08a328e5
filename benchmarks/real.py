"""LENS + PRISM on the real CPU engine, beside FCFS + round-robin and beside llama-server on the same model and load.

    python -m benchmarks.real --trace ../shared/traces/sharegpt_lengths_llama2.csv.gz --short --json real.json
    python -m benchmarks.real --trace ... --more real.json --loads 0.1 0.3 --rounds 3 --duration 9 --json real.json
    python -m benchmarks.real --show real.json --page docs/evaluation-real.md

The machine is quiet, or two neighbours compute without pause; our server has one worker on two threads, or two on one
each; it is told the promise of each request, or not. All systems get the same requests at the same instants (Poisson
arrivals, lengths from the trace, one seed a round) and are judged by the same promise, by the client's clock: TTFT
within 5 times and TPOT within 3 times what llama-server needs when it is idle. Rates are multiples of the capacity of
FCFS + round-robin on the first layout, measured anew for each noise: what a crowd of requests gets. A round goes
through all systems at each rate, another one first each time; figures are medians over rounds. A request that has not
ended `--give-up` seconds after it was to be sent counts as missed.

--more measures further loads against the promise and the capacity of a result that was written before, with its
settings, and adds them to it.

--short takes at most 35 minutes. The machine must be otherwise idle, or the figures mean nothing. The settings of
llama-server are those that real_sweep.py found best.
"""

from __future__ import annotations

import argparse
import json
import math
import sys
import time
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from benchmarks import real_llama
from benchmarks.real_bench import Bench, add_arguments, line, prepare, say, started
from benchmarks.real_report import Promise, Run, filled, promise_of, summary_of, tables
from benchmarks.real_systems import LLAMA, NOISES, System, neighbours, systems_of

_OVERHEAD_S, _BEFORE_S = 6.0, 150.0
"""Of a run: warming up, and answers that come after the last arrival. Before the runs: starts, warming up, probes."""


def measure(args: argparse.Namespace, bench: Bench, result: dict[str, Any], until_s: float) -> None:
    """Put what the runs are measured against into `result`, and each run as soon as it is known.

    Args:
        until_s: no turn through the systems begins after this timestamp.
    """
    if "promise" not in result:
        result |= yardsticks(args, bench)
    promise, capacity = Promise(**result["promise"]), result["capacity_rps"]
    say(f"idle {result['yardstick']}: {result['idle']}; promise: {result['promise']}; capacity: {capacity}")
    turns = [(r, noise, load) for r in range(args.rounds) for noise in args.noises for load in args.loads]
    for number, (round_, noise, load) in enumerate(turns):
        if time.monotonic() > until_s:
            say(f"the time is over: {len(turns) - number} of {len(turns)} turns through the systems are left out")
            break
        rate_rps, seed = load * capacity[noise], args.seed + round_
        items = bench.items(rate_rps, args.duration, seed)
        with neighbours(NOISES[noise]):
            for system in in_turn([s for s in bench.systems if s.noise in ("", noise)], number):
                run = {"noise": noise, "layout": system.layout, "system": system.name, "load": load, "round": round_}
                run |= {"rate_rps": rate_rps, **bench.run(system, items, promise, seed)}
                result["runs"].append(run)
                say(line(run))


def yardsticks(args: argparse.Namespace, bench: Bench) -> dict[str, Any]:
    """What promise and loads are derived from: an idle server, and what a crowd of requests gets, for each noise."""
    yardstick = next((s for s in bench.systems if s.name == LLAMA), bench.systems[-1])
    reference = next((s for s in bench.systems if s.scheduler == args.baseline), bench.systems[0])
    idle = bench.idle(yardstick)
    promise = promise_of(idle, args.ttft_factor, args.tpot_factor)
    capacity: dict[str, float] = {}
    for noise in args.noises:
        with neighbours(NOISES[noise]):
            capacity[noise] = bench.capacity_rps(reference)
    return {
        "idle": asdict(idle),
        "promise": asdict(promise),
        "capacity_rps": capacity,
        "yardstick": yardstick.name,
    }


def in_turn(systems: Sequence[System], number: int) -> list[System]:
    """All of them, another one first with each number."""
    at = number % len(systems)
    return [*systems[at:], *systems[:at]]


def duration_s(minutes: float, runs: int) -> float:
    """Seconds of arrivals in a run so that the whole takes so many minutes.

    Raises:
        ValueError: fewer than 5 s are left for a run.
    """
    left_s = (60 * minutes - _BEFORE_S) / runs - _OVERHEAD_S
    if left_s < 5:
        raise ValueError(f"{minutes:g} minutes are too few for {runs} runs: {left_s:.1f} s each")
    return left_s


def main(argv: Sequence[str] | None = None) -> int:
    args = _arguments(argv)
    if args.show:
        return _show(json.loads(args.show.read_text()), args.page)
    systems = systems_of(args.layouts, args.scheduler, args.baseline, _llamas(args))
    if args.minutes:
        in_each_noise = sum(s.noise in ("", args.noises[0]) for s in systems)
        args.duration = duration_s(args.minutes, args.rounds * len(args.noises) * len(args.loads) * in_each_noise)
    made = {"benchmark": "real", **prepare(args, llama=args.llama), "runs": list[Run](), "took_s": 0.0}
    result: dict[str, Any] = json.loads(args.more.read_text()) if args.more else made
    began_s = time.monotonic() - result["took_s"]
    until_s = time.monotonic() + 60 * args.minutes if args.minutes else math.inf
    try:
        with started(args, systems) as bench:
            measure(args, bench, result, until_s)
    finally:  # what was measured until it was ended is not lost
        result |= {"took_s": time.monotonic() - began_s, "summary": summary_of(result["runs"])}
        if args.json:
            args.json.write_text(json.dumps(result, indent=1) + "\n")
    return _show(result, args.page)


def _llamas(args: argparse.Namespace) -> list[str]:
    """The noises for which llama-server is started: also the quiet one, which gives the promise."""
    return list(dict.fromkeys(["quiet", *args.noises])) if args.llama else []


def _show(result: dict[str, Any], page: Path | None) -> int:
    figures = tables(result)
    print(figures)
    if page is not None:
        page.write_text(filled(page.read_text(), figures))
    return 0


def _arguments(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add_arguments(parser)
    parser.add_argument("--layouts", nargs="+", default=["cpu:2", "cpu:1,cpu:1"], help="devices of our server")
    parser.add_argument("--noises", nargs="+", default=list(NOISES), choices=sorted(NOISES))
    parser.add_argument("--loads", nargs="+", type=float, default=[0.4, 0.6, 0.8, 1.0, 1.2], help="rate over capacity")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--duration", type=float, default=40.0, help="seconds of arrivals in a run")
    parser.add_argument("--minutes", type=float, help="that the whole may take; sets --duration")
    parser.add_argument("--short", action="store_true", help="3 rounds of 3 loads, lengths over 8, 33 minutes")
    parser.add_argument("--scheduler", default="lens")
    parser.add_argument("--baseline", default="fcfs:budget=2048")
    parser.add_argument("--no-llama", dest="llama", action="store_false", help="our own systems only")
    parser.add_argument("--llama-settings", type=Path, nargs="+", default=[], help="what real_sweep.py wrote")
    parser.add_argument("--more", type=Path, help="a result to which further loads are added")
    parser.add_argument("--show", type=Path, help="print the tables of a result that was written before")
    parser.add_argument("--page", type=Path, help="put the tables into this page, between its marks")
    args = parser.parse_args(argv)
    if not (args.trace or args.show):
        parser.error("--trace is missing")
    if args.short:
        args.rounds, args.loads, args.scale, args.minutes, args.give_up = 3, [0.5, 0.8, 1.1], 8.0, 33.0, 15.0
    given = [json.loads(path.read_text()) for path in args.llama_settings]
    args.llama_settings = real_llama.BY_NOISE | {sweep["settings"]["noise"]: sweep["chosen"] for sweep in given}
    if args.more:
        before = json.loads(args.more.read_text())["settings"]
        for name in ("scale", "max_tokens", "weights", "give_up", "scheduler", "baseline", "llama_settings"):
            setattr(args, name, before[name])
    return args


if __name__ == "__main__":
    sys.exit(main())
