"""`nexusengine profiles`: the device profiles that simulator and emulated devices run on, and how to add one's own."""

from __future__ import annotations

import argparse
import dataclasses
import json
from typing import TYPE_CHECKING, Any

from nexusengine.errors import ConfigError

if TYPE_CHECKING:
    from nexusengine.profiles.registry import ProfileInfo

_LEGEND = """
Milliseconds a step: 1, 32 and 128 decodes of 1,024 tokens of context; a prompt of 2,048 tokens; 1,024 tokens of a
prompt (1,024 cached) beside 128 decodes. measured: every part of a mixed step together; composed: kernels measured one
by one; resampled: fitted to a log of steps; roofline: from the datasheet. Other models of similar shape are scaled:
write DEVICE/MODEL. `--json` names the sources; docs/profiles.md says how good they are."""
_COLUMNS = ("decode_1", "decode_32", "decode_128", "prefill_2048", "mixed")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--json", action="store_true", help="print JSON: a list of profiles")
    parser.add_argument("--file", metavar="PROFILE.json", help="check a profile file and show it alone")
    kinds = parser.add_subparsers(dest="kind", metavar="COMMAND")
    fit = kinds.add_parser("fit", help="make a profile file from step logs of your own device")
    fit.description = "Step logs are written by `nexusengine perf record` and by `serve --step-log`."
    fit.add_argument("logs", nargs="+", metavar="LOG", help="step log, .jsonl or .jsonl.gz")
    fit.add_argument("--name", required=True, metavar="DEVICE", help="what to call the device")
    fit.add_argument("--model", default="llama-3.1-8b", metavar="M", help="the model that ran (default: %(default)s)")
    fit.add_argument("--kv-tokens", type=int, metavar="N", help="KV tokens that fit; default: the most held in a step")
    fit.add_argument("--weights-bytes", type=int, metavar="N", help="of the model; default: from its shape, if known")
    fit.add_argument("--output", required=True, metavar="PROFILE.json", help="the file to write")


def run(args: argparse.Namespace) -> int:
    if args.kind == "fit":
        return _fit(args)
    from nexusengine.profiles.registry import file_info, list_profiles

    infos = [file_info(args.file)] if args.file else list_profiles()
    if args.json:
        print(json.dumps([_as_dict(info) for info in infos], indent=1))
        return 0
    _print_table(infos)
    return 0


def _as_dict(info: ProfileInfo) -> dict[str, Any]:
    return {
        "name": info.identity.name,
        **dataclasses.asdict(info.identity),
        "licence": info.licence,
        "noise": info.noise,
        "step_ms": {key: round(value, 3) for key, value in info.step_ms.items()},
    }


def _print_table(infos: list[ProfileInfo]) -> None:
    rows = [["profile", "confidence", "KV tokens", *_COLUMNS]]
    for info in infos:
        of, steps = info.identity, [f"{info.step_ms[c]:.1f}" for c in _COLUMNS]
        rows.append([of.name, of.confidence, f"{of.kv_capacity_tokens:,}", *steps])
    widths = [max(len(row[i]) for row in rows) for i in range(len(rows[0]))]
    for row in rows:
        left = "  ".join(cell.ljust(width) for cell, width in zip(row[:2], widths[:2], strict=True))
        right = "  ".join(cell.rjust(width) for cell, width in zip(row[2:], widths[2:], strict=True))
        print(f"{left}  {right}")
    print(_LEGEND)


def _fit(args: argparse.Namespace) -> int:
    from nexusengine.perf.step_log import read_steps
    from nexusengine.profiles.fit import fit_steps
    from nexusengine.profiles.geometry import MODELS
    from nexusengine.profiles.user_file import write_profile

    features, took_s, held_tokens = [], [], 0
    for log in args.logs:
        for step in read_steps(log):
            features.append(step.features)
            took_s.append(step.ms / 1e3)
            held_tokens = max(held_tokens, sum(step.q) + sum(step.ctx))
    if args.kv_tokens is not None and args.kv_tokens < 1:
        raise ConfigError(f"--kv-tokens must be at least 1, got {args.kv_tokens}", param="kv_tokens")
    weights_bytes = args.weights_bytes
    if weights_bytes is None:
        if args.model not in MODELS:
            raise ConfigError(f"the shape of {args.model!r} is not known; give --weights-bytes", param="weights_bytes")
        weights_bytes = MODELS[args.model].weights_bytes
    fit = fit_steps(features, took_s)
    write_profile(
        args.output,
        device=args.name,
        model=args.model,
        fit=fit,
        kv_capacity_tokens=args.kv_tokens or held_tokens,
        weights_bytes=weights_bytes,
        source=f"fitted to {fit.steps} steps of {', '.join(args.logs)}",
    )
    print(
        f"{args.output}: {args.name}/{args.model}, {fit.steps} steps of up to {fit.longest_step_tokens} tokens, median "
        f"error of the fit {100 * fit.median_error:.1f} %, {args.kv_tokens or held_tokens} KV tokens"
    )
    return 0
