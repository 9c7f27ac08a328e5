"""`nexusengine perf record`: random requests on a local engine, every step of it logged."""

from __future__ import annotations

import argparse
import json
import math
import random
import sys
import time
from pathlib import Path
from typing import TYPE_CHECKING

from nexusengine.config import EngineConfig, load, parse_devices, whole
from nexusengine.config import add_arguments as add_settings
from nexusengine.errors import ConfigError
from nexusengine.types import EngineRequest, SamplingParams

if TYPE_CHECKING:
    from nexusengine.core.engine_core import EngineCore
    from nexusengine.execute.batch import StepBatch
    from nexusengine.wire import StepRecord

_SECONDS = 60.0
_LONGEST_OUTPUT = 256
_SAME_LOAD_S = 2.0


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.description = (
        "Prompts and outputs are random in length, most of them short; how many requests run at a time changes every "
        "two seconds, so that steps of many sizes are logged."
    )
    parser.add_argument("--seconds", type=float, metavar="S", help=f"how long to run (default: {_SECONDS:g})")
    parser.add_argument("--requests", type=_count, metavar="N", help="run so many requests instead, to their end")
    parser.add_argument("--output", required=True, metavar="F", help="the log to write, .jsonl.gz; must not exist")
    parser.add_argument("--load", type=_count, default=8, metavar="N", help="typical requests at a time (default: 8)")
    parser.add_argument("--max-prompt", type=_count, default=2048, metavar="N", help="longest prompt (default: 2048)")
    parser.add_argument("--json", action="store_true", help="print one JSON object at the end; errors in percent")
    add_settings(parser, EngineConfig, skip=frozenset({"step_log"}))


def _count(text: str) -> int:
    try:
        return whole(1)(text)
    except ValueError as error:
        raise argparse.ArgumentTypeError(str(error)) from None


def run(args: argparse.Namespace) -> int:
    config = load(EngineConfig, {n: getattr(args, n) for n in EngineConfig.__dataclass_fields__ if n != "step_log"})
    if len(parse_devices(config.devices)) != 1:
        raise ConfigError(f"devices is {config.devices!r}; steps are recorded on one device at a time", param="devices")
    if args.seconds is not None and args.requests is not None:
        raise ConfigError("give --seconds or --requests, not both", param="seconds")
    seconds = _SECONDS if args.seconds is None else args.seconds
    if not 0.0 < seconds <= 86_400.0:
        raise ConfigError(f"--seconds is {args.seconds:g}, which is not between 0 and 86400", param="seconds")
    if Path(args.output).exists():
        raise ConfigError(f"{args.output} exists already; name a new file", param="output")
    from nexusengine.engine.launch import make_local
    from nexusengine.worker.step_recorder import StepRecorder

    core, _, vocab_size = make_local(config)
    recorder = StepRecorder(args.output)
    errors: list[float] = []

    def on_step(record: StepRecord, batch: StepBatch) -> None:
        recorder.write(record, batch)
        errors.append(100.0 * abs(record.predicted_s - record.device_s) / max(record.device_s, 1e-9))

    core.on_step = on_step
    load_on = _Load(core, vocab_size, random.Random(config.seed), args.load, args.max_prompt)
    try:
        ended = load_on.run(None if args.requests is not None else seconds, args.requests)
    except KeyboardInterrupt:
        ended = load_on.ended
        print("interrupted; what was logged is kept", file=sys.stderr)
    finally:
        recorder.close()
        core.executor.close()
    stats = core.stats()
    result = {
        "output": args.output,
        "steps": recorder.written,
        "dropped": recorder.dropped,
        "requests": ended,
        "computed_tokens": stats.computed_tokens,
        "device_s": round(stats.device_s, 3),
        "live_mape": _mean(errors),
        "live_mape_after_500": _mean(errors[500:]),
    }
    after = "-" if result["live_mape_after_500"] is None else result["live_mape_after_500"]
    if args.json:
        print(json.dumps(result))
    else:
        print(f"{recorder.written} steps of {ended} requests in {args.output}; nexusengine perf replay {args.output}")
        print(f"as they ran, predictions were off by {result['live_mape']} %, after 500 steps {after} %")
    return 0


def _mean(values: list[float]) -> float | None:
    return round(sum(values) / len(values), 2) if values else None


class _Load:
    """load: about how many requests run at a time. ended: requests that came to their end."""

    def __init__(self, core: EngineCore, vocab_size: int, rng: random.Random, load: int, max_prompt: int) -> None:
        self.ended = 0
        self._core, self._vocab_size, self._rng, self._load = core, vocab_size, rng, load
        self._max_prompt = min(max_prompt, core.max_model_len - 1)
        self._sent = 0

    def run(self, seconds: float | None, requests: int | None) -> int:
        core, began_s = self._core, time.monotonic()
        wanted, until_s = 0, began_s
        while True:
            now = time.monotonic()
            if seconds is not None and now - began_s >= seconds:
                return self.ended
            if now >= until_s:
                wanted = self._between(1, min(2 * self._load, core.scheduler.slots))
                until_s = now + _SAME_LOAD_S
            all_sent = requests is not None and self._sent >= requests
            if not all_sent and len(core.request_ids()) < wanted:
                core.add(self._request(now))
                continue
            if not core.has_work:
                if all_sent:
                    return self.ended
                time.sleep(max(until_s - now, 0.0))
            self.ended += sum(delta.finish_reason is not None for delta in core.step())

    def _request(self, now: float) -> EngineRequest:
        prompt = self._between(1, self._max_prompt)
        output = self._between(1, min(_LONGEST_OUTPUT, self._core.max_model_len - prompt))
        self._sent += 1
        ids = [self._rng.randrange(self._vocab_size) for _ in range(prompt)]
        return EngineRequest(
            f"r{self._sent}", ids, SamplingParams(temperature=0.0, max_tokens=output, ignore_eos=True, seed=0), now
        )

    def _between(self, low: int, high: int) -> int:
        """Random, evenly in its logarithm."""
        drawn = low * math.exp(self._rng.random() * math.log(high / low))
        return max(low, min(high, round(drawn)))
