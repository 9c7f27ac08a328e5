"""The contract of every step-time model (contract 2 of the architecture)."""

from __future__ import annotations

from typing import NamedTuple, Protocol

from nexusengine.arrays import F8
from nexusengine.perf.features import StepFeatures
from nexusengine.perf.kinds import RecentError
from nexusengine.wire import PerfSnapshot


class StepTime(NamedTuple):
    """A predicted duration in seconds.

    Attributes:
        mean_s: the mean.
        upper_s: the bound that is held in 95 % of steps.
    """

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


class PerformanceModel(Predictor, Protocol):
    """A predictor that learns from each step measured."""

    def observe(self, features: StepFeatures, seconds: float) -> None:
        """Learn from one measured step. Non-finite or non-positive durations are ignored."""
        ...

    def observe_cold(self, features: StepFeatures, seconds: float) -> None:
        """As `observe`, of a step that ran right after idle time or a graph capture: it says little of the others."""
        ...

    def expect_change(self) -> None:
        """Believe the next steps sooner if they show a change: the device itself says that its speed may have changed.

        It says so by a lower clock, for example, but not how large the change is, or whether there is one.
        """
        ...

    def recent_error(self, features: StepFeatures) -> RecentError:
        """How well steps of the same kind as this one were predicted of late, and how many of them were measured.

        By this, whoever tells predictions to users decides whether the model is to be trusted yet. Costs no more than
        finding the kind.
        """
        ...

    def snapshot(self) -> PerfSnapshot: ...
