"""What a kept step-time model is worth: errors of the first steps after a restart, with and without it.

    python -m benchmarks.step_times_restart [--devices cpu:1] [--rounds 6] [--teach 40] [--steps 50] [--no-calibrate]
    python -m benchmarks.step_times_restart --logs LOG.jsonl.gz ...

On one real executor. A first core serves random requests for `--teach` seconds, and its model is kept as a worker keeps
it. Then cores begin as a restarted worker's does, in turn without and with what was kept, calibrate, and serve the same
random requests for `--steps` steps. Printed are the errors of the predictions that the scheduler had, in percent of the
measured time, over the first 10 and over all steps, of all rounds.

With step logs instead of a device, six restarts in each log: the state of a model that has seen the log so far,
resumed, beside a new model, neither of them calibrated, on the next `--steps` steps.
"""

from __future__ import annotations

import argparse
import random
import tempfile
import time
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from nexusengine.cli.perf import load_steps
from nexusengine.clock import MonotonicClock
from nexusengine.config import EngineConfig, load, parse_devices
from nexusengine.execute.factory import make_executor
from nexusengine.loading.resolve import resolve_model
from nexusengine.perf.online import OnlineModel
from nexusengine.perf.prior import GENERIC
from nexusengine.perf.replay import MeasuredStep
from nexusengine.types import EngineRequest, SamplingParams
from nexusengine.wire import StepRecord
from nexusengine.worker.build import executor_options, make_core
from nexusengine.worker.model_store import ModelStore, Remembered
from nexusengine.worker.resume import resumed

if TYPE_CHECKING:
    from nexusengine.core.engine_core import EngineCore
    from nexusengine.execute.batch import StepBatch

_MOST_AT_ONCE, _LONGEST_PROMPT, _LONGEST_OUTPUT = 8, 600, 64


def serve(core: EngineCore, rng: random.Random, vocabulary: int, seconds: float, steps: int) -> list[float]:
    """Signed errors in percent of so many steps, or of the steps of so many seconds, whichever end first."""
    errors: list[float] = []

    def on_step(record: StepRecord, batch: StepBatch) -> None:
        del batch
        errors.append(100.0 * (record.predicted_s / max(record.device_s, 1e-9) - 1.0))

    core.on_step = on_step
    until_s, sent, wanted = time.monotonic() + seconds, 0, 4
    while time.monotonic() < until_s and len(errors) < steps:
        if len(core.request_ids()) < wanted:
            prompt = [rng.randrange(vocabulary) for _ in range(rng.randrange(2, _LONGEST_PROMPT))]
            params = SamplingParams(0.0, max_tokens=rng.randrange(2, _LONGEST_OUTPUT), ignore_eos=True, seed=0)
            core.add(EngineRequest(f"r{sent}", prompt, params, time.monotonic()))
            sent += 1
            continue
        wanted = rng.randrange(1, _MOST_AT_ONCE + 1) if rng.random() < 0.1 else wanted
        core.step()
    for request_id in list(core.request_ids()):
        core.abort(request_id)
    while core.has_work:
        core.step()
    return errors


def first_errors(model: OnlineModel, steps: list[MeasuredStep]) -> list[float]:
    errors = []
    for step in steps:
        errors.append(100.0 * abs(model.predict(step.features).mean_s / step.seconds - 1.0))
        model.observe(step.features, step.seconds)
    return errors


def of_log(log: str, count: int) -> None:
    """Prints means of the errors after restarts at six places in the first 3,000 steps of a log."""
    steps = load_steps(log)[1:3000]
    errors: dict[str, list[list[float]]] = {"without": [], "with": []}
    model, at = OnlineModel(), 0
    for place in np.linspace(0.3 * len(steps), len(steps) - count, 6).astype(int).tolist():
        for step in steps[at:place]:
            model.observe(step.features, step.seconds)
        at, following = place, steps[place : place + count]
        again = resumed(Remembered(model.state(), 1.0), GENERIC, [])
        assert again is not None
        errors["without"].append(first_errors(OnlineModel(), following))
        errors["with"].append(first_errors(again, following))
    for how, rounds in errors.items():
        means = [np.mean([r[:first] for r in rounds]) for first in (10, count)]
        print(f"{Path(log).name:42} {how:8} first 10: {means[0]:5.1f} %, first {count}: {means[1]:5.1f} %")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--devices", default="cpu:1")
    parser.add_argument("--rounds", type=int, default=6)
    parser.add_argument("--teach", type=float, default=40.0)
    parser.add_argument("--steps", type=int, default=50)
    parser.add_argument("--no-calibrate", action="store_true")
    parser.add_argument("--logs", nargs="+", default=[], metavar="LOG")
    args = parser.parse_args()
    for log in args.logs:
        of_log(log, args.steps)
    if args.logs:
        return
    config = load(EngineConfig, {"devices": args.devices, "calibrate": not args.no_calibrate})
    files = resolve_model(config.model)
    executor = make_executor(files, parse_devices(config.devices)[0], executor_options(config))
    errors: dict[str, list[list[float]]] = {"without": [], "with": []}
    with tempfile.TemporaryDirectory() as folder:
        store = ModelStore(Path(folder), {"device": args.devices})
        core = make_core(executor, config, MonotonicClock(), geometry=files.config)
        serve(core, random.Random(0), files.config.vocab_size, args.teach, 10**9)
        model = core.scheduler.model
        assert isinstance(model, OnlineModel)
        store.save(model.state())
        print(f"taught by {model.steps} steps; {store.path.stat().st_size} bytes are kept")
        for number in range(args.rounds):
            for how in sorted(errors, reverse=number % 2 == 0):
                kept = store if how == "with" else None
                core = make_core(executor, config, MonotonicClock(), geometry=files.config, store=kept)
                rng = random.Random(1 + number)
                errors[how].append(serve(core, rng, files.config.vocab_size, 600.0, args.steps))
    executor.close()
    for how, rounds in errors.items():
        for first in (10, args.steps):
            off = np.abs(np.concatenate([r[:first] for r in rounds]))
            bias = float(np.median(np.concatenate([r[:first] for r in rounds])))
            print(
                f"{how:8} first {first:3}: median {np.median(off):5.1f} %, mean {off.mean():5.1f} %, p90 "
                f"{np.percentile(off, 90):5.1f} %, median signed {bias:+5.1f} %"
            )


if __name__ == "__main__":
    main()
