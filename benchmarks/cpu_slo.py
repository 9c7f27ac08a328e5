"""Two schedulers on the real CPU engine, past its capacity: how many promises does each keep?

    python -m benchmarks.cpu_slo --schedulers lens,fcfs --runs 3 --output cpu_slo.json

SmolLM2-135M behind `nexusengine serve`, two classes, open-loop Poisson arrivals at `--overload` times the capacity. The
classes are the built-in `interactive` and `batch` in units of this device, so that a slow machine is asked for as much
as a fast one: a probe measures one decode step alone and one prompt token. Then the schedulers take turns, each run on
a fresh server that has been warmed up, with the same requests in both; a run's seed gives its requests. Before each
pair the capacity is probed anew, because the speed of a machine that others use drifts: how many of a crowd of requests
end a second while at most 16 of them run and others wait. Probes run under the last of the schedulers, with lengths and
prompts of another seed.

A run must be long: past capacity the queue grows by (overload - 1) seconds of work a second, and until it is longer
than the TTFT of the interactive class any order will do.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import tempfile
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from benchmarks.real_report import ended_rps
from nexusengine.errors import ConfigError, Unavailable
from nexusengine.loadgen.http import Target
from nexusengine.loadgen.items import WorkItem, items_of
from nexusengine.loadgen.record import Record
from nexusengine.loadgen.run import Run, offer
from nexusengine.loadgen.server import ServerInfo, ask, own_server
from nexusengine.sim.report import rounded_numbers
from nexusengine.sim.workload.build import Builder, WorkloadSpec

USUAL_STEP_S, USUAL_TOKEN_S = 0.010, 0.0001
"""A decode step alone, and a prompt token, on the kind of device that the built-in classes are meant for."""
BUILT_IN = {"interactive": (0.5, 0.001, 0.05), "batch": (30.0, 0.004, 0.5)}
"""TTFT, TTFT a prompt token and TPOT in seconds."""
PROBE_SEED = 987_654
_PROBE_RUNNING = 16
FIGURES = (
    "attainment",
    "attainment_strict",
    "attainment_longest_decile",
    "attainment_token_weighted",
    "output_tokens_per_s",
    "worst_wait_s",
)


@dataclass(frozen=True, slots=True)
class Device:
    """What the probe measured: one decode step, and one prompt token, alone."""

    decode_step_s: float
    prompt_token_s: float


def main(argv: Sequence[str] | None = None) -> int:
    args = _arguments().parse_args(argv)
    schedulers = args.schedulers.split(",") if ":" not in args.schedulers else args.schedulers.split(";")
    if len(schedulers) != 2 or schedulers[0] == schedulers[1]:
        raise ConfigError(f"--schedulers must name two policies, got {args.schedulers!r}", param="schedulers")
    device = _probe_device(args, schedulers[1])
    classes = classes_toml(device, args.interactive)
    _say(f"probe: {_shown(asdict(device))}\n{classes}")
    runs: list[dict[str, Any]] = []
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "classes.toml"
        file.write_text(classes)
        for number in range(args.runs):
            capacity_rps = _probe_capacity_rps(args, schedulers[1])
            of_pair = {"run": number, "seed": args.seed + number, "capacity_rps": capacity_rps}
            for scheduler in schedulers if number % 2 == 0 else schedulers[::-1]:
                done = _run(args, args.overload * capacity_rps, file, scheduler, args.seed + number)
                runs.append({"scheduler": scheduler, **of_pair, **done.figures})
                _say(_line(runs[-1]))
    result = {
        "benchmark": "cpu_slo",
        "settings": {k: v for k, v in vars(args).items() if k != "output"},
        "device": rounded_numbers(asdict(device)),
        "classes": classes,
        "summary": summary_of(runs, schedulers),
        "runs": runs,
    }
    if args.output:
        Path(args.output).write_text(json.dumps(result, indent=1) + "\n")
    print(table(result["summary"], schedulers))
    return 0


def _arguments() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--schedulers", default="lens,fcfs", help="two policies; with options, separated by a semicolon"
    )
    parser.add_argument("--devices", default="cpu:1", help="one core is left for client, server and router")
    parser.add_argument("--lengths", default="input=logn:100:400,output=logn:24:64", help="as of bench serve")
    parser.add_argument("--trace", help="a trace instead; see --scale")
    parser.add_argument("--scale", type=float, help="divide the trace's lengths by this")
    parser.add_argument("--max-model-len", type=int, default=2048)
    parser.add_argument("--overload", type=float, default=1.2, help="rate of arrivals over capacity")
    parser.add_argument("--interactive", type=float, default=0.6, help="share of the class; the rest is batch")
    parser.add_argument("--duration", type=float, default=150.0, help="seconds of arrivals in a run")
    parser.add_argument("--runs", type=int, default=3, help="of each scheduler, in turns")
    parser.add_argument("--probe-requests", type=int, default=40, help="in a probe of the capacity")
    parser.add_argument("--seed", type=int, default=0, help="of the first run; each run has the next")
    parser.add_argument("--output", help="write everything as JSON")
    return parser


def classes_toml(device: Device, interactive: float) -> str:
    """The two classes in units of this device."""
    step, token = device.decode_step_s / USUAL_STEP_S, device.prompt_token_s / USUAL_TOKEN_S
    tables = []
    for name, (ttft_s, per_token_s, tpot_s) in BUILT_IN.items():
        share = interactive if name == "interactive" else 1 - interactive
        bounds = {"ttft_s": ttft_s * step, "ttft_per_token_s": per_token_s * token, "tpot_s": tpot_s * step}
        lines = [f"{key} = {value:.6f}" for key, value in {**bounds, "share": share}.items()]
        tables.append("\n".join([f"[{name}]", *lines]))
    return "\n\n".join(tables) + "\n"


def summary_of(runs: Sequence[dict[str, Any]], schedulers: Sequence[str]) -> dict[str, Any]:
    """Medians over runs by scheduler, and of the differences (first less second) between runs on the same requests."""
    medians: dict[str, Any] = {}
    for scheduler in schedulers:
        mine = [r for r in runs if r["scheduler"] == scheduler]
        medians[scheduler] = {key: statistics.median(r[key] for r in mine) for key in FIGURES}
        for key in ("ttft_ms", "tpot_ms"):
            medians[scheduler][f"{key}_p50"] = statistics.median(r[key]["p50"] for r in mine)
            medians[scheduler][f"{key}_p99"] = statistics.median(r[key]["p99"] for r in mine)
        names = sorted({name for r in mine for name in r["attainment_by_class"]})
        for name in names:
            of_class = [r["attainment_by_class"][name] for r in mine if name in r["attainment_by_class"]]
            medians[scheduler][f"attainment_{name}"] = statistics.median(of_class)
    numbers = sorted({r["run"] for r in runs})
    gains = []
    for number in numbers:
        pair = {r["scheduler"]: r["attainment"] for r in runs if r["run"] == number}
        gains.append(100 * (pair[schedulers[0]] - pair[schedulers[1]]))
    return {"medians": medians, "gain_points": gains, "gain_points_median": statistics.median(gains)}


def table(summary: dict[str, Any], schedulers: Sequence[str]) -> str:
    keys = list(summary["medians"][schedulers[0]])
    width = max(map(len, keys))
    lines = [f"{'median of runs':{width}}  " + "  ".join(f"{s:>16}" for s in schedulers)]
    for key in keys:
        values = (summary["medians"][s].get(key) for s in schedulers)
        lines.append(f"{key:{width}}  " + "  ".join(f"{'-' if v is None else f'{v:.3f}':>16}" for v in values))
    gains = ", ".join(f"{g:+.1f}" for g in summary["gain_points"])
    lines.append(f"attainment of {schedulers[0]} over {schedulers[1]}, in points, run by run: {gains}")
    return "\n".join(lines)


# ---- runs -----------------------------------------------------------------------------------------------------------


def _options(args: argparse.Namespace, scheduler: str) -> list[str]:
    fixed = ["--no-prefix-caching", "--max-model-len", str(args.max_model_len), "--log-level", "warning"]
    return ["--devices", args.devices, "--scheduler", scheduler, *fixed]


def _run(args: argparse.Namespace, rate_rps: float, classes: Path, scheduler: str, seed: int) -> Run:
    with own_server([*_options(args, scheduler), "--slo-classes", str(classes)]) as url:
        target, info = Target(url), ask(url)
        _warm_up(target, info)
        items = _items(args, info, rate_rps, args.duration, str(classes), seed)
        return offer(target, items, info, seed=seed, timeout_s=10 * args.duration)


def _items(
    args: argparse.Namespace, info: ServerInfo, rate_rps: float, duration_s: float, classes: str, seed: int
) -> list[WorkItem]:
    spec = WorkloadSpec(
        trace=args.trace or f"lengths:{args.lengths}",
        arrivals="poisson",
        rate_rps=rate_rps,
        duration_s=duration_s,
        classes=classes,
        seed=seed,
        max_tokens=info.max_model_len or args.max_model_len,
        scale=args.scale,
    )
    return items_of(Builder(spec).build())


def _warm_up(target: Target, info: ServerInfo) -> None:
    """Prompts of all lengths beside decodes, so that every path has run and the performance model has seen it."""
    lengths = [int(16 * 1.6**k) for k in range(9)]
    items = [WorkItem(0.15 * i, n, 24) for i, n in enumerate([*lengths, *reversed(lengths)])]
    offer(target, items, info, seed=PROBE_SEED)


def _probe_device(args: argparse.Namespace, scheduler: str) -> Device:
    with own_server(_options(args, scheduler)) as url:
        target, info = Target(url), ask(url)
        _warm_up(target, info)
        alone = [offer(target, [WorkItem(0.0, 128, 48)], info, seed=PROBE_SEED + k).records[0] for k in range(3)]
        long = [offer(target, [WorkItem(0.0, 1024, 1)], info, seed=PROBE_SEED + k).records[0] for k in range(3)]
    _all_answered([*alone, *long])
    return Device(statistics.median(r.tpot_s for r in alone), statistics.median(r.ttft_s for r in long) / 1024)


def _probe_capacity_rps(args: argparse.Namespace, scheduler: str) -> float:
    """Requests of this workload a second while a queue stands."""
    with own_server([*_options(args, scheduler), "--max-running", str(_PROBE_RUNNING)]) as url:
        target, info = Target(url), ask(url)
        _warm_up(target, info)
        items = _items(args, info, 100.0, args.probe_requests / 100.0, "batch", PROBE_SEED)
        crowd = [replace(i, send_at_s=0.0, slo=None, slo_class=None) for i in items]
        records = offer(target, crowd, info, seed=PROBE_SEED).records
    _all_answered(records)
    return ended_rps([r.ended_s for r in records])


def _all_answered(records: Sequence[Record]) -> None:
    failed = [r.error for r in records if r.error]
    if failed:
        raise Unavailable(f"the probe failed: {failed[0]}")


def _line(run: dict[str, Any]) -> str:
    shown = {key: run[key] for key in ("scheduler", "run", "capacity_rps", "offered", "completed", *FIGURES)}
    return f"{time.strftime('%H:%M:%S')} {_shown(shown)} client {100 * run['client_cpu_share']:.0f} %"


def _shown(values: dict[str, Any]) -> str:
    return ", ".join(f"{k} {v:.4g}" if isinstance(v, float) else f"{k} {v}" for k, v in values.items())


def _say(text: str) -> None:
    print(text, file=sys.stderr, flush=True)


if __name__ == "__main__":
    sys.exit(main())
