"""`nexusengine sim replay`: measured runs of vLLM, simulated, and how far the simulation is from them."""

from __future__ import annotations

import argparse
import dataclasses
import json
import sys
from typing import Any

from nexusengine.errors import ConfigError

_SETTINGS = ("max_num_seqs", "max_num_batched_tokens", "kv_tokens", "max_model_len")
_IN_TABLE = [f"{what}_{which}" for what in ("ttft", "tpot", "e2e") for which in ("mean", "p50")]


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--profile", metavar="DEVICE/MODEL", help="see `nexusengine profiles`")
    parser.add_argument("--workload", metavar="FILE", help="the requests that were sent, JSON lines")
    parser.add_argument(
        "--measured", metavar="RUN", help="folder of the run, or its requests.jsonl; meta.json beside it"
    )
    parser.add_argument(
        "--runs",
        metavar="FOLDER",
        help="instead of one run all of a folder: DEVICE/MODEL/requests.jsonl, and workload_*.jsonl beside them",
    )
    for name in _SETTINGS:
        option = "--" + name.replace("_", "-")
        parser.add_argument(option, type=int, metavar="N", help="instead of what meta.json or the profile says")
    parser.add_argument(
        "--uncertainty",
        action=argparse.BooleanOptionalAction,
        default=True,
        help="replay up to nine times more, for how far each figure may be off (default on)",
    )
    parser.add_argument("--json", action="store_true", help="print one JSON object instead of a table")


def run(args: argparse.Namespace) -> int:
    if args.runs is not None:
        if args.profile or args.workload or args.measured:
            raise ConfigError("--runs finds profiles, workloads and measurements itself; give it alone", param="runs")
        return _all_runs(args)
    missing = [f"--{name}" for name in ("profile", "workload", "measured") if not getattr(args, name)]
    if missing:
        raise ConfigError(f"sim replay needs {', '.join(missing)}, or --runs FOLDER", param="replay")
    return _one_run(args)


def _one_run(args: argparse.Namespace) -> int:
    from nexusengine.sim.vllm_run import read_measured, read_settings, read_workload

    sent = read_workload(args.workload)
    measured = read_measured(args.measured, sent)
    out = _replay(args, args.profile, sent, read_settings(args.measured), measured)
    if args.json:
        print(json.dumps(out))
        return 0
    print(f"{out['profile']} ({out['confidence']}), {len(sent)} requests, {out['steps']} steps", file=sys.stderr)
    print(f"{'':12}{'measured ms':>13}{'simulated ms':>14}{'+-':>8}{'error':>9}")
    for key in [key for key in out if key.endswith("_pct")]:
        name = key.removesuffix("_pct")
        theirs, ours = out[f"{name}_measured_ms"], out[f"{name}_ms"]
        print(f"{name:12}{theirs:13.1f}{ours:14.1f}{_share(out, name):>8}{out[key]:+8.2f}%")
    return 0


def _all_runs(args: argparse.Namespace) -> int:
    from nexusengine.sim.vllm_runs import runs_in

    found, runs = {}, runs_in(args.runs)
    if not args.json:
        print(f"{'simulated over measured, percent':40}" + "".join(f"{name:>16}" for name in _IN_TABLE))
    for each in runs:
        sent, settings, measured = each.read()
        out = found[str(each)] = _replay(args, each.profile, sent, settings, measured)
        if not args.json:
            cells = [f"{out[f'{name}_pct']:+.2f} {_share(out, name)}" for name in _IN_TABLE]
            print(f"{each!s:40}" + "".join(f"{cell:>16}" for cell in cells), flush=True)
    if args.json:
        print(json.dumps(found))
    return 0


def _replay(args: argparse.Namespace, spec: str, sent: Any, settings: Any, measured: Any) -> dict[str, Any]:
    from nexusengine.sim.replay import compare, profile_for, replay
    from nexusengine.sim.uncertainty import uncertainty

    given = {name: getattr(args, name) for name in _SETTINGS if getattr(args, name) is not None}
    settings = dataclasses.replace(settings, **given)
    profile = profile_for(spec, settings)
    replayed = replay(profile, sent, settings)
    out: dict[str, Any] = dict(compare(replayed.simulated, measured))
    if args.uncertainty:
        out["uncertainty_pct"] = uncertainty(profile, sent, settings, replayed)
    return out | {
        "profile": profile.identity.name,
        "confidence": profile.identity.confidence,
        "requests": len(sent),
        "steps": replayed.steps,
        "preemptions": replayed.preemptions,
        "cached_tokens": replayed.cached_tokens,
        "settings": dataclasses.asdict(settings),
    }


def _share(out: dict[str, Any], name: str) -> str:
    return f"+-{out['uncertainty_pct'][name]['all']:.1f}" if "uncertainty_pct" in out else ""
