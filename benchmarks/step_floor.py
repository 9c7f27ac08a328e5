"""How much of the error of predicted step times is scatter: python -m benchmarks.step_floor LOG.jsonl.gz ...

Of step logs (`nexusengine perf record`), in percent of the measured time, mean absolute errors after 500 steps:

- online: predicted before it was learned from, as a worker does.
- whole log: the same model, shown the whole log three times and then asked again, with what was measured before and
  after each step.
- nearest: for each step the median of its 16 nearest others in the whole log, by the features that the model has and
  relative to its prediction of each. It knows past and future, and has no form of its own to be wrong in.
- scatter: what two steps after each other of like composition differ by, beyond what the model says they should, over
  the square root of two. A predictor that knew the mean of every step exactly would still be off by as much, if
  successive errors were independent.
"""

from __future__ import annotations

import argparse
import math
import time
from pathlib import Path

import numpy as np

from nexusengine.arrays import F8
from nexusengine.cli.perf import load_steps
from nexusengine.perf.basis import TERMS
from nexusengine.perf.curve import Curve
from nexusengine.perf.kinds import stratum
from nexusengine.perf.online import OnlineModel
from nexusengine.perf.replay import MeasuredStep, figures, replay

_SKIPPED, _NEAREST, _LIKE_TOKENS = 500, 16, 0.1


def errors(predicted_s: F8, measured_s: F8) -> F8:
    return 100.0 * np.abs(predicted_s / measured_s - 1.0)


def whole_log(steps: list[MeasuredStep]) -> Curve:
    """By the weights alone: what was so at the end of the log is not said of its other steps."""
    model = OnlineModel()
    for _ in range(3):
        for step in steps:
            if not step.warm_up:
                model.observe(step.features, step.seconds)
    weights = model.snapshot().weights
    return Curve(weights[:TERMS], weights[TERMS])


def nearest(steps: list[MeasuredStep], predicted_s: F8, measured_s: F8) -> F8:
    """Predictions from the nearest other steps of the same kind."""
    kinds = np.array([stratum(s.features) for s in steps])
    columns = np.array(
        [
            [math.log(f.tokens), math.log(f.sequences), math.log1p(f.prefill_attention), math.log1p(f.decode_kv_tokens)]
            for f in (s.features for s in steps)
        ]
    )
    result = predicted_s.copy()
    log_ratio = np.log(measured_s / predicted_s)
    for kind in np.unique(kinds):
        chosen = np.nonzero(kinds == kind)[0]
        if len(chosen) <= _NEAREST:
            continue
        for i in chosen:
            far = ((columns[chosen] - columns[i]) ** 2).sum(axis=1)
            far[chosen == i] = np.inf
            close = chosen[np.argpartition(far, _NEAREST)[:_NEAREST]]
            result[i] *= math.exp(float(np.median(log_ratio[close])))
    return result


def scatter(steps: list[MeasuredStep], predicted_s: F8, measured_s: F8) -> float:
    off = np.log(measured_s / predicted_s)
    differences = [
        abs(off[i] - off[i - 1])
        for i in range(max(_SKIPPED, 1), len(steps))
        if stratum(steps[i].features) == stratum(steps[i - 1].features)
        and abs(steps[i].features.tokens / steps[i - 1].features.tokens - 1.0) <= _LIKE_TOKENS
    ]
    return 100.0 * float(np.mean(differences)) / math.sqrt(2.0) if differences else math.nan


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("log", nargs="+")
    args = parser.parse_args()
    print(f"{'log':34}{'steps':>7}{'online':>9}{'whole log':>11}{'nearest':>9}{'scatter':>9}")
    for log in args.log:
        steps = load_steps(log)
        if len(steps) <= _SKIPPED:
            print(f"{Path(log).name:34}{len(steps):>7}  too few steps")
            continue
        measured_s = np.array([s.seconds for s in steps])
        live = figures(replay(OnlineModel(), steps, time.thread_time))["mape_after_500"]
        model = whole_log(steps)
        predicted_s = np.array([model.predict(s.features).mean_s for s in steps])
        hindsight = errors(predicted_s, measured_s)[_SKIPPED:].mean()
        knn = errors(nearest(steps, predicted_s, measured_s), measured_s)[_SKIPPED:].mean()
        print(
            f"{Path(log).name:34}{len(steps):>7}{live:>9.2f}{hindsight:>11.2f}{knn:>9.2f}"
            f"{scatter(steps, predicted_s, measured_s):>9.2f}"
        )


if __name__ == "__main__":
    main()
