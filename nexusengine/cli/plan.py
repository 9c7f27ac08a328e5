"""`nexusengine plan`: which mix of devices serves a load, at what cost, and what limits it."""

from __future__ import annotations

import argparse
import json
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict
from typing import TYPE_CHECKING, Any

from nexusengine.cli.recorded import TRACE_HELP, fill, recording_of, trace_of
from nexusengine.cli.sim import USUAL
from nexusengine.errors import ConfigError

if TYPE_CHECKING:
    from nexusengine.sim.plan import Plan
    from nexusengine.sim.workload.recording import Recording

_USUAL = {name: USUAL[name] for name in ("model", "engine", "router", "prefix_caching")} | {"classes": "mixed"}
_SETTINGS: dict[str, tuple[str, Callable[[Any], Any]]] = {
    "perf": ("perf", str),
    "scheduler_cost": ("scheduler_cost_s", float),
    "max_batch_tokens": ("max_batch_tokens", int),
    "max_running": ("max_running", int),
    "max_waiting": ("max_waiting", int),
    "block_size": ("block_size", int),
    "max_model_len": ("max_model_len", int),
    "link_delay": ("link_delay_s", float),
    "snapshot_period": ("snapshot_period_s", float),
    "request_timeout": ("request_timeout_s", float),
    "stated_limit": ("stated_limit", str),
}
"""Options of `sim`, and the fields of SimSpec that they are."""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument
    add("--trace", required=True, nargs="+", metavar="F", help=TRACE_HELP)
    add(
        "--candidates",
        "--devices",
        metavar="LIST",
        help="e.g. '2xh100; h100+4xl4; 4xl40s'; of a recorded trace also: this, this:w0, this-w1, this+l4 (default "
        "this)",
    )
    add("--rate", type=float, metavar="R", help="requests a second to be served; default: the trace's")
    add("--speed", type=float, default=1.0, metavar="F", help="times the trace's own rate instead (default 1)")
    add("--arrivals", default="trace", metavar="trace|poisson|gamma:CV", help="(default trace)")
    add("--duration", type=float, metavar="S", help="seconds to simulate; default: the trace's, or 600")
    add("--model", metavar="M", help="model served (default llama-3.1-8b)")
    add("--classes", metavar="NAME|mixed|FILE.toml|recorded", help="SLO classes (default mixed; recorded, if they are)")
    add(
        "--slo",
        metavar="TTFT:TPOT[:PER_TOKEN]",
        help="one promise for all instead: milliseconds to the first token, a further token, and a prompt token more",
    )
    add("--targets", default="0.9,0.99", metavar="A,...", help="shares of promises to be kept (default 0.9,0.99)")
    add("--longest-decile", type=float, default=0.75, metavar="A", help="and of the longest tenth (default 0.75)")
    add("--prices", metavar="NAME=P,...|FILE.toml", help="dollars an hour, and watts; default: an indicative list")
    add(
        "--rank",
        choices=("price", "tokens", "energy"),
        default="price",
        help="cheapest by dollars an hour (default), dollars a million tokens, or joules a token",
    )
    add("--engine", metavar="NAME[:key=value,...]", help="engine policy (default lens)")
    add("--router", metavar="NAME", help="router policy (default prism)")
    add(
        "--prefix-caching",
        action=argparse.BooleanOptionalAction,
        default=None,
        help="reuse KV of equal prompt beginnings, by the trace's block ids",
    )
    add("--seed", type=int, default=0, metavar="N", help="of everything random (default 0)")
    add("--seeds", type=int, default=1, metavar="N", help="seeds from --seed on; means count (default 1)")
    add("--head-room", action=argparse.BooleanOptionalAction, default=True, help="search for the highest rates")
    add("--precision", type=float, default=0.05, metavar="P", help="of that search, relative (default 0.05)")
    add("--json", action="store_true", help="print one JSON object instead of a table")
    add("--plot", metavar="FILE.png", help="highest rates against cost")


def run(args: argparse.Namespace) -> int:
    from nexusengine.cli.sim import _Progress, seeds_of
    from nexusengine.profiles.prices import read_costs, usual_costs
    from nexusengine.sim.api import SimSpec
    from nexusengine.sim.plan import parse_candidates, plan
    from nexusengine.sim.plots import plot_plan, require_matplotlib
    from nexusengine.sim.tables import print_plan

    if args.plot:
        require_matplotlib()
    trace = trace_of(args.trace)
    recording = recording_of(trace)
    if args.candidates is None and recording is None:
        raise ConfigError("give --candidates, e.g. '2xh100; h100+4xl4'", param="candidates")
    fill(args, recording, _USUAL)
    candidates, targets = parse_candidates(args.candidates or "this"), _targets(args.targets)
    prices = read_costs(args.prices) if args.prices else usual_costs()
    with _classes(args) as classes, _Progress("planning") as bar:
        spec = SimSpec(
            trace=trace,
            devices=candidates[0],
            arrivals=args.arrivals,
            rate_rps=args.rate,
            speed=args.speed,
            duration_s=args.duration,
            model=args.model,
            engine=args.engine,
            router=args.router,
            classes=classes,
            seed=args.seed,
            prefix_caching=args.prefix_caching,
            **_of_the_server(recording),
        )
        made = plan(
            spec,
            candidates,
            targets=targets,
            longest_decile=args.longest_decile,
            seeds=seeds_of(args),
            prices=prices,
            rank=args.rank,
            head_room=args.head_room,
            precision=args.precision,
            progress=bar.say,
        )
    if args.plot:
        plot_plan(made, args.plot)
    if args.json:
        print(json.dumps(_as_dict(made) | {"spec": asdict(spec)}))
    else:
        print_plan(made)
    return 0


def _of_the_server(recording: Recording | None) -> dict[str, Any]:
    """Settings of a recorded server for which `plan` has no options."""
    if recording is None:
        return {}
    namespace = argparse.Namespace(**dict.fromkeys(_SETTINGS))
    fill(namespace, recording, {option: USUAL[option] for option in _SETTINGS})
    return {name: cast(getattr(namespace, option)) for option, (name, cast) in _SETTINGS.items()}


def _as_dict(made: Plan) -> dict[str, Any]:
    found = asdict(made)
    for target in made.targets:
        best = made.cheapest(target)
        found.setdefault("cheapest", {})[f"{target:g}"] = best.devices if best is not None else None
    return found


def _targets(text: str) -> list[float]:
    try:
        targets = sorted(float(word) for word in text.split(",") if word.strip())
    except ValueError:
        targets = []
    if not targets or not all(0.0 < t <= 1.0 for t in targets):
        raise ConfigError(f"targets are shares such as 0.9,0.99, got {text!r}", param="targets")
    return targets


@contextmanager
def _classes(args: argparse.Namespace) -> Iterator[str]:
    """The SLO classes by name or file; a file of one class while a promise was given in numbers."""
    if args.slo is None:
        yield args.classes
        return
    try:
        ttft_ms, tpot_ms, *more = map(float, args.slo.split(":"))
        (per_token_ms,) = more or (0.0,)
    except ValueError:
        raise ConfigError(f"--slo is TTFT:TPOT or TTFT:TPOT:PER_TOKEN in milliseconds, got {args.slo!r}") from None
    with tempfile.NamedTemporaryFile("w", suffix=".toml") as file:
        values = {
            "ttft_s": ttft_ms / 1e3,
            "tpot_s": tpot_ms / 1e3,
            "ttft_per_token_s": per_token_ms / 1e3,
            "share": 1.0,
        }
        file.write("[promised]\n" + "".join(f"{key} = {value!r}\n" for key, value in values.items()))
        file.flush()
        yield file.name
