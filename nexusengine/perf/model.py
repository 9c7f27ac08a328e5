"""The contract of every step-time model (contract 2 of the architecture)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

from nexusengine.arrays import F8
from nexusengine.perf.features import StepFeatures
from nexusengine.wire import PerfSnapshot


@dataclass(frozen=True, slots=True)
class StepTime:
    """A predicted duration: the mean, and the bound that is held in 95 % of steps. Seconds."""

    mean_s: float
    upper_s: float


class Predictor(Protocol):
    """Predicts the duration of a step from its composition."""

    def predict(self, features: StepFeatures) -> StepTime:
        """Seconds; never negative, never NaN."""
        ...

    def mean_s(self, tokens: F8, sequences: F8, prefills: F8, prefill_attention: F8, decode_kv_tokens: F8) -> F8:
        """`predict(...).mean_s` of many steps at once. The arguments are the fields of StepFeatures; they broadcast."""
        ...

    def max_tokens(self, budget_s: float, base: StepFeatures, context: int, limit: int) -> int:
        """The inverse: the largest chunk q <= limit of a prompt with `context` tokens in its cache that can join the
        step `base` with the upper bound still within `budget_s`; 0 if none."""
        ...


class PerformanceModel(Predictor, Protocol):
    """A predictor that learns from each step measured."""

    def observe(self, features: StepFeatures, seconds: float) -> None:
        """Learn from one measured step. Non-finite or non-positive durations are ignored."""
        ...

    def observe_cold(self, features: StepFeatures, seconds: float) -> None:
        """As `observe`, of a step that ran right after idle time or a graph capture: it says little of the others."""
        ...

    def expect_change(self) -> None:
        """The device itself says that its speed may have changed, as by a lower clock: where its next steps show a
        change, that is to be believed sooner. Says nothing of how large it is, or whether there is one."""
        ...

    def snapshot(self) -> PerfSnapshot: ...
