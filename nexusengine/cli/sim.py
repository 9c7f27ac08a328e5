"""`nexusengine sim`: simulate a server on measured device profiles. docs/simulator.md explains its options."""

from __future__ import annotations

import argparse
import importlib
import importlib.util
import json
import os
import sys
from dataclasses import asdict
from typing import TYPE_CHECKING, Any

from nexusengine.cli.recorded import TRACE_HELP, fill, recording_of, trace_of
from nexusengine.errors import ConfigError

if TYPE_CHECKING:
    from nexusengine.sim.api import SimSpec
    from nexusengine.sim.goodput import Tried
    from nexusengine.sim.sweep import Point

_REPLAY = "nexusengine.cli.sim_replay"
USUAL = {
    "classes": "interactive",
    "model": "llama-3.1-8b",
    "engine": "lens",
    "router": "prism",
    "perf": "online",
    "scheduler_cost": "0",
    "prefix_caching": False,
    "max_batch_tokens": 2048,
    "max_running": 256,
    "max_waiting": 1024,
    "block_size": 16,
    "max_model_len": 131_072,
    "link_delay": 0.0005,
    "snapshot_period": 0.1,
    "request_timeout": 600.0,
    "stated_limit": "none",
    "devices": None,
}
"""Values of options that are not given and that no recorded trace answers."""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    kinds = parser.add_subparsers(dest="kind", metavar="KIND", required=True)
    run_one = kinds.add_parser("run", help="one simulation")
    _add_options(run_one, rate=True)
    run_one.add_argument("--plot", metavar="FILE.png", help="CDFs of TTFT and TPOT, and the load over time")
    run_one.add_argument(
        "--uncertainty",
        action="store_true",
        help="simulate four times more, for the range of each figure: slower and faster devices, other seeds",
    )

    many = kinds.add_parser("sweep", help="every engine policy with every router policy at every rate")
    _add_options(many, rate=False)
    many.add_argument("--rates", nargs="+", required=True, metavar="R", help="requests a second, each a simulation")
    many.add_argument("--engines", nargs="+", metavar="NAME[:key=value,...]", help="engine policies; default: --engine")
    many.add_argument("--routers", nargs="+", metavar="NAME", help="router policies; default: --router")
    many.add_argument("--seeds", type=int, default=1, metavar="N", help="seeds from --seed on (default 1)")
    many.add_argument("--jobs", type=int, default=os.cpu_count() or 1, metavar="N", help="processes (default: all)")
    many.add_argument("--plot", metavar="FILE.png", help="attainment against rate")

    most = kinds.add_parser("goodput", help="the highest rate at which promises are kept")
    _add_options(most, rate=False)
    most.add_argument("--target", type=float, default=0.9, metavar="A", help="least attainment (default 0.9)")
    most.add_argument(
        "--longest-decile",
        type=float,
        default=0.75,
        metavar="A",
        help="least attainment of the tenth of requests with the longest prompts (default 0.75)",
    )
    most.add_argument("--seeds", type=int, default=1, metavar="N", help="seeds from --seed on; means count (default 1)")
    most.add_argument("--precision", type=float, default=0.02, metavar="P", help="relative (default 0.02)")
    most.add_argument("--first-rate", type=float, metavar="R", help="where the search begins")
    most.add_argument("--plot", metavar="FILE.png", help="attainment against the rates that were tried")

    beside = kinds.add_parser("compare", help="a recorded load: what the simulator says beside what the server did")
    _add_options(beside, rate=False)
    beside.add_argument(
        "--seeds", type=int, default=5, metavar="N", help="seeds from --seed on; means count (default 5)"
    )
    beside.add_argument(
        "--steady", action="store_true", help="without the changes of the devices' speed over time that were recorded"
    )

    if importlib.util.find_spec(_REPLAY) is not None:
        replay = kinds.add_parser("replay", help="a measured run of another engine, against its measurements")
        importlib.import_module(_REPLAY).add_arguments(replay)


def run(args: argparse.Namespace) -> int:
    if args.kind == "replay":
        return int(importlib.import_module(_REPLAY).run(args))
    return {"run": _run_one, "sweep": _sweep, "goodput": _goodput, "compare": _compare}[args.kind](args)


def _add_options(parser: argparse.ArgumentParser, *, rate: bool) -> None:
    add = parser.add_argument
    add("--trace", required=True, nargs="+", metavar="F", help=TRACE_HELP)
    add("--arrivals", default="trace", metavar="trace|poisson|gamma:CV", help="(default trace)")
    if rate:
        add("--rate", type=float, metavar="R", help="requests a second (closed loops: sessions); default: the trace's")
        add("--speed", type=float, default=1.0, metavar="F", help="times the trace's own rate instead (default 1)")
    add("--duration", type=float, metavar="S", help="seconds in which requests arrive; default: the trace's, or 600")
    add(
        "--devices",
        metavar="LIST",
        help="e.g. h100,a100,2xl4 (see nexusengine profiles); of a recorded trace: this, this:w0, this-w1 (default "
        "this)",
    )
    add("--model", metavar="M", help="model served (default llama-3.1-8b)")
    add("--engine", metavar="NAME[:key=value,...]", help="engine policy (default lens)")
    add("--router", metavar="NAME", help="router policy (default prism)")
    add("--classes", metavar="NAME|mixed|FILE.toml|recorded", help="SLO classes (default interactive)")
    add("--seed", type=int, default=0, metavar="N", help="of everything random (default 0)")
    add("--json", action="store_true", help="print one JSON object instead of a table")
    more = parser.add_argument_group(
        "the engines", "Defaults are those of a recorded trace's server, where the trace is one."
    )
    add = more.add_argument
    add("--perf", metavar="NAME|oracle|scaled:F", help="performance model (default online)")
    add("--noise", action=argparse.BooleanOptionalAction, default=True, help="scatter of step times (default on)")
    add("--scheduler-cost", metavar="measured|S", help="CPU seconds charged to each step (default 0)")
    add(
        "--prefix-caching",
        action=argparse.BooleanOptionalAction,
        default=None,
        help="reuse KV of equal prompt beginnings, by the trace's block ids",
    )
    add("--max-batch-tokens", type=int, metavar="N", help="tokens a step (default 2048)")
    add("--max-running", type=int, metavar="N", help="sequences with KV in a worker (default 256)")
    add("--max-waiting", type=int, metavar="N", help="requests waiting in a worker (default 1024)")
    add("--block-size", type=int, metavar="N", help="tokens in a KV block (default 16)")
    add("--kv-tokens", type=int, metavar="N", help="KV capacity of each worker; default: the profile's")
    add("--max-model-len", type=int, metavar="N", help="prompt + output (default 131072)")
    more = parser.add_argument_group("the rest of the server")
    add = more.add_argument
    add("--link-delay", type=float, metavar="S", help="of each message (default 0.0005)")
    add("--snapshot-period", type=float, metavar="S", help="of workers' load reports (default 0.1)")
    add("--loss", type=float, default=0.0, metavar="P", help="share of load reports lost (default 0)")
    add("--request-timeout", type=float, metavar="S", help="requests are given up after (default 600)")
    add(
        "--fault",
        action="append",
        default=[],
        metavar="KIND:WORKER:AT[:X]",
        help="slow:W:AT:FACTOR, crash:W:AT[:RESTART_S] or join:W:AT; may be repeated",
    )
    add(
        "--scale-lengths",
        type=float,
        metavar="F",
        help="divide all lengths by F; default: 1, sessions: so that they fit",
    )
    add("--stated-limit", metavar="none|exact|N|recorded", help="max_tokens that clients state (default none)")


def _spec(args: argparse.Namespace, **more: Any) -> SimSpec:
    from nexusengine.sim.api import SimSpec

    trace = trace_of(args.trace)
    fill(args, recording_of(trace), USUAL)
    if args.devices is None:
        raise ConfigError("give --devices, e.g. h100,2xl4; only a recorded trace has some of its own", param="devices")
    if args.scheduler_cost == "measured":
        cost_s = None
    else:
        try:
            cost_s = float(args.scheduler_cost)
        except ValueError:
            raise ConfigError(f"--scheduler-cost is measured or seconds, got {args.scheduler_cost!r}") from None
    return SimSpec(
        trace=trace,
        devices=args.devices,
        arrivals=args.arrivals,
        rate_rps=getattr(args, "rate", None),
        speed=getattr(args, "speed", 1.0),
        duration_s=args.duration,
        model=args.model,
        engine=args.engine,
        router=args.router,
        classes=args.classes,
        seed=args.seed,
        perf=args.perf,
        noise=args.noise,
        scheduler_cost_s=cost_s,
        prefix_caching=args.prefix_caching,
        max_batch_tokens=args.max_batch_tokens,
        max_running=args.max_running,
        max_waiting=args.max_waiting,
        block_size=args.block_size,
        kv_tokens=args.kv_tokens,
        max_model_len=args.max_model_len,
        link_delay_s=args.link_delay,
        snapshot_period_s=args.snapshot_period,
        loss=args.loss,
        faults=tuple(args.fault),
        request_timeout_s=args.request_timeout,
        scale=args.scale_lengths,
        stated_limit=args.stated_limit,
        **more,
    )


def _run_one(args: argparse.Namespace) -> int:
    from nexusengine.sim.api import simulate
    from nexusengine.sim.plots import plot_run, require_matplotlib
    from nexusengine.sim.ranges import ranges
    from nexusengine.sim.tables import print_ranges, print_run

    if args.plot:
        require_matplotlib()
    with _Progress("simulating") as bar:
        result = simulate(_spec(args, timeline=bool(args.plot)), progress=bar.virtual_time)
        found = ranges(result) if args.uncertainty else None
    if args.plot:
        plot_run(result, args.plot)
    if args.json:
        print(json.dumps(result.metrics | {"spec": asdict(result.spec)} | ({"ranges": found} if found else {})))
    else:
        print_run(result)
        if found:
            print_ranges(found)
    return 0


def _sweep(args: argparse.Namespace) -> int:
    from nexusengine.sim.plots import plot_sweep, require_matplotlib
    from nexusengine.sim.sweep import specs_of, sweep
    from nexusengine.sim.tables import print_points

    if args.plot:
        require_matplotlib()
    try:
        rates = [float(word) for text in args.rates for word in text.split(",") if word]
    except ValueError:
        raise ConfigError(f"--rates are numbers, got {' '.join(args.rates)!r}") from None
    spec = _spec(args)
    seeds = seeds_of(args)
    specs = specs_of(spec, args.engines or [args.engine], args.routers or [args.router], rates, seeds)
    with _Progress("sweeping", len(specs)) as bar:
        points: list[Point] = sweep(specs, args.jobs, lambda point: bar.step())
    if args.plot:
        plot_sweep(points, args.plot)
    if args.json:
        print(json.dumps({"spec": asdict(spec), "points": [asdict(point) for point in points]}))
    else:
        print_points(points)
    return 0


def _compare(args: argparse.Namespace) -> int:
    from nexusengine.sim.compare import compare
    from nexusengine.sim.tables import print_comparison

    spec = _spec(args)
    found = compare(spec, seeds=seeds_of(args), steady=args.steady)
    if args.json:
        print(json.dumps(found | {"spec": asdict(spec)}))
    else:
        print_comparison(found)
    return 0


def _goodput(args: argparse.Namespace) -> int:
    from nexusengine.sim.goodput import goodput
    from nexusengine.sim.plots import plot_tried, require_matplotlib
    from nexusengine.sim.tables import print_goodput

    if args.plot:
        require_matplotlib()
    spec = _spec(args)
    with _Progress("searching") as bar:

        def show(tried: Tried) -> None:
            holds = "holds" if tried.holds else "does not hold"
            bar.say(f"{tried.rate_rps:.3g} requests/s {holds}")

        found = goodput(
            spec,
            target=args.target,
            longest_decile=args.longest_decile,
            seeds=seeds_of(args),
            precision=args.precision,
            first_rate_rps=args.first_rate,
            progress=show,
        )
    if args.plot:
        plot_tried(found, args.target, args.longest_decile, args.plot)
    if args.json:
        tried = [asdict(t) for t in found.tried]
        print(json.dumps({"goodput_rps": found.rate_rps, **found.metrics, "tried": tried, "spec": asdict(spec)}))
    else:
        print_goodput(found, args.target, args.longest_decile)
    return 0


def seeds_of(args: argparse.Namespace) -> range:
    """The seeds that --seed and --seeds ask for. Raises ConfigError."""
    if args.seeds < 1:
        raise ConfigError(f"--seeds must be at least 1, got {args.seeds}", param="seeds")
    return range(args.seed, args.seed + args.seeds)


class _Progress:
    """A bar on stderr where that is a terminal, nothing elsewhere."""

    def __init__(self, text: str, total: int | None = None) -> None:
        from rich.console import Console
        from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn

        columns = (TextColumn("{task.description}"), BarColumn(), TimeElapsedColumn())
        self._bar = Progress(*columns, console=Console(stderr=True), transient=True, disable=not sys.stderr.isatty())
        self._text = text
        self._task = self._bar.add_task(text, total=total)

    def __enter__(self) -> _Progress:
        self._bar.start()
        return self

    def __exit__(self, *error: object) -> None:
        self._bar.stop()

    def virtual_time(self, now_s: float, ended: int, offered: int) -> None:
        self._bar.update(self._task, completed=ended, total=offered, description=f"{self._text}, {now_s:.0f} s")

    def step(self) -> None:
        self._bar.advance(self._task)

    def say(self, text: str) -> None:
        self._bar.update(self._task, description=f"{self._text}: {text}")
