"""`nexusengine sim replay`: a measured run of vLLM, simulated, and how far the simulation is from it."""

from __future__ import annotations

import argparse
import dataclasses
import json
import sys
from typing import Any

_SETTINGS = ("max_num_seqs", "max_num_batched_tokens", "kv_tokens", "max_model_len")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--profile", required=True, metavar="DEVICE/MODEL", help="see `nexusengine profiles`")
    parser.add_argument("--workload", required=True, metavar="FILE", help="the requests that were sent, JSON lines")
    parser.add_argument(
        "--measured", required=True, metavar="RUN", help="folder of the run, or its requests.jsonl; meta.json beside it"
    )
    for name in _SETTINGS:
        option = "--" + name.replace("_", "-")
        parser.add_argument(option, type=int, metavar="N", help="instead of what meta.json or the profile says")
    parser.add_argument("--json", action="store_true", help="print one JSON object instead of a table")


def run(args: argparse.Namespace) -> int:
    from nexusengine.sim.replay import compare, profile_for, replay
    from nexusengine.sim.vllm_run import read_measured, read_settings, read_workload

    sent = read_workload(args.workload)
    measured = read_measured(args.measured, sent)
    settings = read_settings(args.measured)
    given = {name: getattr(args, name) for name in _SETTINGS if getattr(args, name) is not None}
    settings = dataclasses.replace(settings, **given)
    profile = profile_for(args.profile, settings)
    replayed = replay(profile, sent, settings)
    errors = compare(replayed.simulated, measured)
    if args.json:
        about: dict[str, Any] = {
            "profile": profile.identity.name,
            "confidence": profile.identity.confidence,
            "requests": len(sent),
            "steps": replayed.steps,
            "preemptions": replayed.preemptions,
            "cached_tokens": replayed.cached_tokens,
            "settings": dataclasses.asdict(settings),
        }
        print(json.dumps(errors | about))
        return 0
    print(
        f"{profile.identity.name} ({profile.identity.confidence}), {len(sent)} requests, {replayed.steps} steps",
        file=sys.stderr,
    )
    print(f"{'':12}{'measured ms':>13}{'simulated ms':>14}{'error':>9}")
    for key, percent in errors.items():
        if key.endswith("_pct"):
            name = key.removesuffix("_pct")
            theirs, ours = errors[f"{name}_measured_ms"], errors[f"{name}_ms"]
            print(f"{name:12}{theirs:13.1f}{ours:14.1f}{percent:+8.2f}%")
    return 0
