"""The contract of every step-time model (contract 2 of the architecture)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

from nexusengine.perf.features import StepFeatures


@dataclass(frozen=True, slots=True)
class StepTime:
    """A predicted duration: the mean, and the bound that is held in 95 % of steps. Seconds."""

    mean_s: float
    upper_s: float


@dataclass(frozen=True, slots=True)
class PerfSnapshot:
    """Enough to rebuild the same predictor in another process.

    kind: which model; weights: its parameters in that model's own order and units (documented there).
    quantile: factor from mean to upper bound. steps: observations learned from. epoch: rises when drift was accepted.
    """

    kind: str
    weights: tuple[float, ...]
    quantile: float
    steps: int = 0
    epoch: int = 0


class PerformanceModel(Protocol):
    """Predicts the duration of a step from its composition, and learns from each one measured."""

    def predict(self, features: StepFeatures) -> StepTime:
        """Seconds; never negative, never NaN."""
        ...

    def observe(self, features: StepFeatures, seconds: float) -> None:
        """Learn from one measured step. Non-finite or non-positive durations are ignored."""
        ...

    def max_tokens(self, budget_s: float, base: StepFeatures, context: int, limit: int) -> int:
        """The inverse: the largest chunk q <= limit of a prompt with `context` tokens in its cache that can join the
        step `base` with the upper bound still within `budget_s`; 0 if none."""
        ...

    def snapshot(self) -> PerfSnapshot: ...
