"""`nexusengine perf replay | record`: how well step times are predicted, and logs of step times."""

from __future__ import annotations

import argparse
import json
import math
import sys
import time
from pathlib import Path
from typing import Any

from nexusengine.cli import perf_record
from nexusengine.config import whole
from nexusengine.errors import ConfigError
from nexusengine.perf.devices import DATASHEETS
from nexusengine.perf.prior import GENERIC, Prior, roofline
from nexusengine.perf.registry import MODELS, make_model
from nexusengine.perf.replay import MeasuredStep, figures, replay
from nexusengine.perf.step_log import read_steps

_TABLE = ("mape", "mape_after_500", "mape_first_100", "mape_mixed", "p99", "coverage_95", "us_per_step")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    kinds = parser.add_subparsers(dest="kind", metavar="KIND", required=True)
    played = kinds.add_parser("replay", help="predict every step of a log before learning from it")
    played.description = (
        "Errors are in percent of the measured time; coverage_95 is the percentage of steps within their upper bound; "
        "us_per_step is the CPU time of predicting and learning."
    )
    played.add_argument("log", nargs="+", help="step log, .jsonl or .jsonl.gz")
    played.add_argument("--model", default="online", choices=sorted(MODELS), help="default: online")
    played.add_argument("--all-models", action="store_true", help="compare all models")
    played.add_argument("--train-max-tokens", type=_count, metavar="N", help="learn only from steps of up to N tokens")
    played.add_argument("--device", choices=sorted(DATASHEETS), help="begin with this device's datasheet")
    played.add_argument("--model-config", metavar="FILE", help="config.json of the model, for --device")
    played.add_argument("--json", action="store_true", help="print JSON: an object, or a list of them for several")
    recorded = kinds.add_parser("record", help="serve random prompts on a local engine and log every step")
    perf_record.add_arguments(recorded)


def _count(text: str) -> int:
    try:
        return whole(1)(text)
    except ValueError as error:
        raise argparse.ArgumentTypeError(str(error)) from None


def run(args: argparse.Namespace) -> int:
    return perf_record.run(args) if args.kind == "record" else _replay(args)


# ---- replay ---------------------------------------------------------------------------------------------------------


def _replay(args: argparse.Namespace) -> int:
    prior = _prior(args.device, args.model_config)
    results: list[dict[str, Any]] = []
    for log in args.log:
        steps = load_steps(log)
        for name in MODELS if args.all_models else (args.model,):
            played = replay(make_model(name, prior), steps, time.thread_time, args.train_max_tokens)
            results.append({"log": log, "model": name, "unit": "percent", **_rounded(figures(played))})
    if args.json:
        print(json.dumps(results[0] if len(results) == 1 else results))
    else:
        _print_table(results, unseen=args.train_max_tokens is not None)
    return 0


def load_steps(path: str) -> list[MeasuredStep]:
    """The steps of a log; its first step includes the warm-up of a run. Raises ConfigError."""
    steps = [MeasuredStep(s.features, s.ms / 1e3, warm_up=i == 0) for i, s in enumerate(read_steps(path))]
    if not steps:
        raise ConfigError(f"{path} holds no step")
    return steps


def _prior(device: str | None, model_config: str | None) -> Prior:
    if device is None:
        if model_config is not None:
            raise ConfigError("--model-config says nothing without --device", param="device")
        return GENERIC
    from nexusengine.loading.config_json import parse_config
    from nexusengine.loading.files import read_json
    from nexusengine.perf.prior import EIGHT_BILLION

    model = EIGHT_BILLION if model_config is None else parse_config(read_json(Path(model_config)), model_config)
    return roofline(DATASHEETS[device], model)


def _rounded(values: dict[str, float | None]) -> dict[str, float | None]:
    return {key: value if value is None else round(value, 4) for key, value in values.items()}


def _print_table(results: list[dict[str, Any]], *, unseen: bool) -> None:
    from rich.console import Console
    from rich.table import Table

    keys = (*_TABLE, *(("steps_unseen", "bias_unseen") if unseen else ()))
    table = Table(caption="percent, but us_per_step")
    table.add_column("log", overflow="fold")
    table.add_column("model")
    for key in keys:
        table.add_column(key, justify="right")
    for r in results:
        cells = ("-" if r[key] is None or math.isnan(r[key]) else f"{r[key]:.2f}".removesuffix(".00") for key in keys)
        table.add_row(Path(r["log"]).name.split(".")[0], r["model"], *cells)
    Console(width=None if sys.stdout.isatty() else 160).print(table)
