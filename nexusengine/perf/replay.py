"""Prequential replay of a step log: each step is predicted before it is learned from."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from nexusengine.arrays import F8
from nexusengine.perf.features import StepFeatures
from nexusengine.perf.model import PerformanceModel

_FIRST, _SETTLED = 100, 500


@dataclass(frozen=True, slots=True)
class MeasuredStep:
    """A step of a log.

    Attributes:
        features: its composition.
        seconds: how long it took.
        warm_up: it is the first of a run, and not observed.
    """

    features: StepFeatures
    seconds: float
    warm_up: bool = False


@dataclass(frozen=True, slots=True)
class Replay:
    """Predictions for each step, `[N]`, beside the measured durations.

    Attributes:
        measured_s: what it took.
        mean_s: predicted mean.
        upper_s: predicted upper bound.
        tokens: of the step.
        mixed: whether it had a prefill.
        observed: whether the model learned from it.
        cost_s: CPU time of all predictions and observations.
    """

    measured_s: F8
    mean_s: F8
    upper_s: F8
    tokens: F8
    mixed: npt.NDArray[np.bool_]
    observed: npt.NDArray[np.bool_]
    cost_s: float


def replay(
    model: PerformanceModel,
    steps: Sequence[MeasuredStep],
    timer: Callable[[], float],
    train_max_tokens: int | None = None,
) -> Replay:
    """Predict each step, then let the model observe it.

    Args:
        model: it learns from the steps.
        steps: in order.
        timer: seconds, for `cost_s`.
        train_max_tokens: steps with more tokens are predicted but not observed.
    """
    limit = math.inf if train_max_tokens is None else train_max_tokens
    observed = [not s.warm_up and s.features.tokens <= limit for s in steps]
    predicted = []
    began_s = timer()
    for step, observe in zip(steps, observed, strict=True):
        predicted.append(model.predict(step.features))
        if observe:
            model.observe(step.features, step.seconds)
    cost_s = timer() - began_s
    return Replay(
        measured_s=np.array([s.seconds for s in steps]),
        mean_s=np.array([p.mean_s for p in predicted]),
        upper_s=np.array([p.upper_s for p in predicted]),
        tokens=np.array([s.features.tokens for s in steps], np.float64),
        mixed=np.array([s.features.prefills > 0 for s in steps], np.bool_),
        observed=np.array(observed, np.bool_),
        cost_s=cost_s,
    )


def figures(r: Replay) -> dict[str, float | None]:
    """Errors and coverage in percent, None where there is no such step.

    Returns:
        mape: mean of |predicted - measured| / measured; mape_after_500 leaves the first 500 steps out, mape_first_100
            takes only those; mape_mixed and mape_decode are of one kind of step. p99: of the same relative errors.
            coverage_95: share of steps within their upper bound. bias: mean of (predicted - measured) / measured.
            *_unseen: of steps with more tokens than were learned from. us_per_step: CPU time of predict and observe.
    """
    signed: F8 = 100.0 * (r.mean_s - r.measured_s) / r.measured_s
    error: F8 = np.abs(signed)
    half = len(error) // 2
    unseen = r.tokens > r.tokens[r.observed].max(initial=0.0)
    return {
        "steps": len(error),
        "mape": _mean(error),
        "mape_after_500": _mean(error[_SETTLED:]),
        "mape_first_100": _mean(error[:_FIRST]),
        "mape_mixed": _mean(error[r.mixed]),
        "mape_decode": _mean(error[~r.mixed]),
        "p99": float(np.percentile(error, 99)) if len(error) else None,
        "coverage_95": _mean(np.where(r.measured_s <= r.upper_s, 100.0, 0.0)),
        "bias": _mean(signed),
        "mape_first_half": _mean(error[:half]),
        "mape_second_half": _mean(error[half:]),
        "mape_mixed_first_half": _mean(error[:half][r.mixed[:half]]),
        "mape_mixed_second_half": _mean(error[half:][r.mixed[half:]]),
        "steps_unseen": int(unseen.sum()),
        "mape_unseen": _mean(error[unseen]),
        "bias_unseen": _mean(signed[unseen]),
        "us_per_step": 1e6 * r.cost_s / len(error) if len(error) else None,
    }


def _mean(values: F8) -> float | None:
    return float(values.mean()) if len(values) else None
