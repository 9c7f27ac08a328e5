"""When a prediction is good enough to be told to a user. PURE."""

from __future__ import annotations

from collections.abc import Iterable

from nexusengine.perf.features import StepFeatures
from nexusengine.perf.model import PerformanceModel

_LEAST_STEPS = 4
"""Measured steps of a kind, below which its error is anyone's guess."""
_LARGEST_ERROR = 0.25
"""Mean relative error of a kind's newest steps, above which nothing is told that depends on it."""
_MEMORY = 16  # first tokens
_LARGEST_TTFT_ERROR = 0.4
_MOST = 1.0


def is_trustworthy(model: PerformanceModel, steps: Iterable[StepFeatures]) -> bool:
    """Whether the model has seen enough steps of these kinds, and has predicted the newest of them well.

    Args:
        steps: one of each kind that a prediction depends on.
    """
    errors = [model.recent_error(step) for step in steps]
    return all(e.steps >= _LEAST_STEPS and e.relative <= _LARGEST_ERROR for e in errors)


class TTFTErrors:
    """How well first tokens were predicted of late, whether or not that was told.

    Attributes:
        mean: running mean of the relative errors of about the last 16, where a single one counts for 1 at most.
    """

    def __init__(self) -> None:
        self.mean, self._count = 0.0, 0

    @property
    def small(self) -> bool:
        """Whether predictions may be told: what has not been wrong yet may."""
        return self.mean <= _LARGEST_TTFT_ERROR

    def learn(self, predicted_s: float, measured_s: float) -> None:
        """A request has its first token."""
        error = min(abs(predicted_s - measured_s) / max(measured_s, 1e-6), _MOST)
        self._count += 1
        self.mean += (error - self.mean) / min(self._count, _MEMORY)
