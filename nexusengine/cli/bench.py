"""`nexusengine bench throughput`: offline throughput and latency of one engine in this process.

`bench serve` is in bench_serve.
"""

from __future__ import annotations

import argparse
import json
import random
import resource
import statistics
import time
from typing import Any

from nexusengine.cli import bench_serve
from nexusengine.config import EngineConfig, load, whole
from nexusengine.config import add_arguments as add_settings
from nexusengine.errors import ConfigError
from nexusengine.types import RequestOutput, SamplingParams

_SETTINGS = frozenset({"seed"})


def add_arguments(parser: argparse.ArgumentParser) -> None:
    kinds = parser.add_subparsers(dest="kind", metavar="KIND", required=True)
    throughput = kinds.add_parser("throughput", help="many requests at once, as fast as they go")
    for option, default, help in (
        ("--requests", 32, "requests, all there from the start"),
        ("--input-tokens", 256, "length of each prompt"),
        ("--output-tokens", 64, "tokens generated for each"),
        ("--repeat", 1, "runs; the medians are printed"),
    ):
        throughput.add_argument(option, type=_count, default=default, metavar="N", help=help)
    throughput.add_argument("--seed", type=int, default=0, help="seed of the random prompts")
    throughput.add_argument("--json", action="store_true", help="print one JSON object instead of a table")
    add_settings(throughput, EngineConfig, skip=_SETTINGS)
    bench_serve.add_arguments(kinds.add_parser("serve", help="requests at their times against a server"))


def _count(text: str) -> int:
    try:
        return whole(1)(text)
    except ValueError as error:
        raise argparse.ArgumentTypeError(str(error)) from None


def run(args: argparse.Namespace) -> int:
    return bench_serve.run(args) if args.kind == "serve" else _run_throughput(args)


def _run_throughput(args: argparse.Namespace) -> int:
    from nexusengine.engine.engine import Engine

    config = load(EngineConfig, {k: v for k, v in vars(args).items() if k not in _SETTINGS})
    settings = {name: getattr(config, name) for name in EngineConfig.__dataclass_fields__ if name != "model"}
    settings["prefix_caching"] = False  # random prompts share nothing, and repeated runs must not help each other
    with Engine(config.model, **settings) as engine:
        if args.input_tokens + args.output_tokens > engine.max_model_len:
            raise ConfigError(
                f"{args.input_tokens} + {args.output_tokens} tokens exceed the longest sequence of "
                f"{engine.max_model_len} tokens"
            )
        rng = random.Random(args.seed)
        prompts = [
            [rng.randrange(10, engine.vocab_size) for _ in range(args.input_tokens)] for _ in range(args.requests)
        ]
        sampling = SamplingParams(temperature=0.0, max_tokens=args.output_tokens, ignore_eos=True)
        engine.generate(prompts[:1], SamplingParams(temperature=0.0, max_tokens=4, ignore_eos=True), progress=False)
        runs = [_measure(engine, prompts, sampling) for _ in range(args.repeat)]
    figures = {key: statistics.median(run[key] for run in runs) for key in runs[0]}
    figures["peak_rss_mb"] = _peak_rss_mb()
    result: dict[str, Any] = {
        "model": config.model,
        "devices": config.devices,
        "requests": args.requests,
        "input_tokens": args.input_tokens,
        "output_tokens": args.output_tokens,
        "runs": args.repeat,
        **{key: round(value, 4) for key, value in figures.items()},
    }
    if args.json:
        print(json.dumps(result))
    else:
        width = max(map(len, result))
        for key, value in result.items():
            print(f"{key:{width}}  {value}")
    return 0


def _measure(engine: Any, prompts: list[list[int]], sampling: SamplingParams) -> dict[str, float]:
    before = engine.stats()
    started_s = time.perf_counter()
    outputs: list[RequestOutput] = engine.generate(prompts, sampling, progress=False)
    elapsed_s = time.perf_counter() - started_s
    after = engine.stats()
    generated = sum(len(o.token_ids) for o in outputs)
    total = generated + sum(map(len, prompts))
    timings = [o.timings for o in outputs if o.timings is not None]
    ttft = [t.ttft_s for t in timings if t.ttft_s is not None]
    tpot = [t.tpot_s for t in timings if t.tpot_s is not None]
    return {
        "elapsed_s": elapsed_s,
        "output_tokens_per_s": generated / elapsed_s,
        "total_tokens_per_s": total / elapsed_s,
        "ttft_ms": 1e3 * statistics.median(ttft),
        "tpot_ms": 1e3 * statistics.median(tpot) if tpot else 0.0,
        "device_s": after["device_s"] - before["device_s"],
        "scheduler_s": after["scheduler_s"] - before["scheduler_s"],
        "steps": after["steps"] - before["steps"],
    }


def _peak_rss_mb() -> float:
    """The larger peak of this process and its children; Linux counts in KiB."""
    return max(resource.getrusage(who).ru_maxrss for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN)) / 1024
