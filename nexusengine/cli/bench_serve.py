"""`nexusengine bench serve`: an open-loop client against a running server, or one it starts for itself."""

from __future__ import annotations

import argparse
import dataclasses
import json
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from nexusengine.cli.recorded import TRACE_HELP, fill, recording_of, trace_of
from nexusengine.config import ServeConfig, flag
from nexusengine.config import add_arguments as add_settings
from nexusengine.errors import ConfigError

_NOT_OURS = frozenset({"seed", "host", "port", "api_key"})
_USUAL_MODEL_LEN = 4096  # of servers that do not say


def add_arguments(parser: argparse.ArgumentParser) -> None:
    target = parser.add_argument_group("target")
    target.add_argument("--url", metavar="URL", help="a server that runs; without it one is started with the settings")
    target.add_argument("--api-key", metavar="KEY", help="bearer token of that server")
    load = parser.add_argument_group("load")
    load.add_argument("--trace", nargs="+", metavar="FILE", help=TRACE_HELP)
    load.add_argument(
        "--lengths",
        metavar="L",
        help="instead of a trace: input=DIST,output=DIST; DIST is N, LOW..HIGH, exp:MEAN or logn:MEDIAN:P90",
    )
    load.add_argument("--arrivals", default="trace", metavar="A", help="trace, poisson or gamma:CV")
    load.add_argument("--scale", type=float, metavar="F", help="divide all lengths by this, for small models")
    load.add_argument("--rate", type=float, metavar="R", help="requests a second; default: the trace's own")
    load.add_argument("--speed", type=float, default=1.0, metavar="F", help="times the trace's own rate (default: 1)")
    load.add_argument(
        "--duration",
        type=float,
        metavar="S",
        help="seconds in which requests are sent (default: 60; of a recorded trace all)",
    )
    load.add_argument(
        "--classes",
        metavar="C",
        help="a class, mixed, a TOML file, or recorded (default: recorded if they are, else interactive)",
    )
    load.add_argument("--send-bounds", action="store_true", help="ask for SLOs in numbers, not by class")
    load.add_argument("--seed", type=int, default=0, help="seed of arrivals, lengths, classes and prompts")
    load.add_argument("--timeout", type=float, default=600.0, metavar="S", help="after which an answer is given up")
    report = parser.add_argument_group("report")
    report.add_argument("--json", action="store_true", help="print one JSON object instead of a table")
    report.add_argument("--output", metavar="FILE", help="write the JSON object, with every request, to a file")
    add_settings(parser, ServeConfig, skip=_NOT_OURS)


def run(args: argparse.Namespace) -> int:
    from nexusengine.loadgen.http import Target
    from nexusengine.loadgen.run import offer
    from nexusengine.loadgen.server import ask

    recording = None if args.trace is None else recording_of(trace_of(args.trace))
    fill(args, recording, {"classes": "interactive", "duration": None if recording else 60.0})
    with _target_url(args) as url:
        target = Target(url, args.api_key)
        info = ask(url, args.api_key)
        items = _items(args, info.max_model_len or _USUAL_MODEL_LEN)
        with _Progress(len(items)) as progress:
            done = offer(
                target,
                items,
                info,
                seed=args.seed,
                bounds=args.send_bounds,
                timeout_s=args.timeout,
                progress=progress.advance,
            )
    figures = {"url": url, "model": info.model, **_asked(args), **done.figures}
    if args.output:
        requests = [_row(r) for r in done.records]
        Path(args.output).write_text(json.dumps({**figures, "requests": requests}, indent=1) + "\n")
    if args.json:
        print(json.dumps(figures))
    else:
        _table(figures)
    return 0


@contextmanager
def _target_url(args: argparse.Namespace) -> Iterator[str]:
    """Raises ConfigError if both a server and settings for one are given."""
    settings = {f.name: getattr(args, f.name) for f in dataclasses.fields(ServeConfig) if f.name not in _NOT_OURS}
    given = {name: value for name, value in settings.items() if value is not None}
    if args.url:
        if given:
            raise ConfigError(f"{flag(next(iter(given)))} is for a server of our own; with --url it has no effect")
        yield args.url.rstrip("/")
        return
    if args.classes.endswith(".toml"):
        given.setdefault("slo_classes", args.classes)

    from nexusengine.loadgen.server import own_server

    options = []
    for name, value in given.items():
        options += [flag(name if value else f"no_{name}")] if isinstance(value, bool) else [flag(name), str(value)]
    with own_server(options) as url:
        yield url


def _items(args: argparse.Namespace, max_tokens: int) -> list[Any]:
    from nexusengine.loadgen.items import items_of
    from nexusengine.sim.workload.build import Builder, WorkloadSpec

    if (args.trace is None) == (args.lengths is None):
        raise ConfigError("give either --trace FILE or --lengths input=DIST,output=DIST", param="trace")
    spec = WorkloadSpec(
        trace=f"lengths:{args.lengths}" if args.trace is None else trace_of(args.trace),
        arrivals=args.arrivals,
        rate_rps=args.rate,
        speed=args.speed,
        duration_s=args.duration,
        classes=args.classes,
        seed=args.seed,
        max_tokens=max_tokens,
        scale=args.scale,
    )
    return items_of(Builder(spec).build())


def _row(record: Any) -> dict[str, Any]:
    item = record.item
    numbers = {
        "send_at_s": item.send_at_s,
        "late_ms": 1e3 * record.late_s,
        "ttft_ms": 1e3 * record.ttft_s,
        "tpot_ms": 1e3 * record.tpot_s,
        "e2e_ms": 1e3 * record.e2e_s,
    }
    return {
        "class": item.slo_class,
        "prompt_tokens": item.prompt_tokens,
        "output_tokens": record.output_tokens,
        **{key: round(value, 3) if value == value else None for key, value in numbers.items()},
        "error": record.error,
        "nexus": record.nexus,
    }


def _asked(args: argparse.Namespace) -> dict[str, Any]:
    names = ("trace", "lengths", "arrivals", "rate", "speed", "duration", "scale", "classes", "seed")
    return {name: getattr(args, name) for name in names}


def _table(figures: dict[str, Any]) -> None:
    flat: dict[str, Any] = {}
    for key, value in figures.items():
        if isinstance(value, dict):
            flat |= {f"{key}.{k}": v for k, v in value.items()}
        else:
            flat[key] = value
    width = max(map(len, flat))
    for key, value in flat.items():
        print(f"{key:{width}}  {value}")


class _Progress:
    """A bar on stderr, if that is a terminal."""

    def __init__(self, total: int) -> None:
        self._total = total
        self._bar: Any = None

    def advance(self, record: Any) -> None:
        if self._bar is not None:
            self._bar.advance(self._task)

    def __enter__(self) -> _Progress:
        if sys.stderr.isatty():
            from rich.console import Console
            from rich.progress import Progress

            self._bar = Progress(console=Console(stderr=True))
            self._bar.start()
            self._task = self._bar.add_task("requests", total=self._total)
        return self

    def __exit__(self, *exc: object) -> None:
        if self._bar is not None:
            self._bar.stop()
