"""When a prediction is good enough to be told to a user. PURE."""

from __future__ import annotations

from collections.abc import Iterable

from nexusengine.perf.features import StepFeatures
from nexusengine.perf.model import PerformanceModel

LEAST_STEPS = 3
"""Measured steps of a kind, below which its error is anyone's guess."""
LARGEST_ERROR = 0.3
"""Mean relative error of a kind's newest steps, from which on nothing is told that depends on it."""


def is_trustworthy(model: PerformanceModel, steps: Iterable[StepFeatures]) -> bool:
    """Whether the model has seen enough steps of these kinds, and has predicted the newest of them well.

    Args:
        steps: one of each kind that a prediction depends on.
    """
    errors = [model.recent_error(step) for step in steps]
    return all(e.steps >= LEAST_STEPS and e.relative <= LARGEST_ERROR for e in errors)
