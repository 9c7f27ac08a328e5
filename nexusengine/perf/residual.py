"""A model's errors, from measured steps: how far up they reach, how long they last, and when the device has changed."""

from __future__ import annotations

import math
from bisect import bisect_left, insort
from collections import deque
from dataclasses import dataclass

_QUANTILE, _FIRST_FACTOR = 0.95, 1.2
_WINDOW, _LEVEL_STEP = 100, 0.01
_FEW, _MARGIN_OF_FEW = 19, 0.02  # of fewer than 19 the 95 % quantile is beyond the largest
_BLEND, _BLEND_LEVEL, _JUDGE = 0.3, 0.5, 0.02
_LARGEST = 0.1  # a deviation beyond it is not taken for a trend, but for a change of the device if it stays
_SPIKE, _SPIKES = math.log(1.6), 8
_OFF_STEPS = 16
_EXPECTED_FOR, _EXPECTED_SPIKES, _EXPECTED_OFF_STEPS = 64, 3, 6


class Bound:
    """The factor from a predicted mean to the bound that 95 % of steps keep, >= 1.

    A quantile of measured / predicted over the last 100 steps. Which quantile is controlled, so that what was
    promised holds in the long run whatever the errors are like: a little higher after each step that broke the bound,
    a little lower after each that kept it (Gibbs and Candès, Adaptive Conformal Inference, 2021, equation 2).
    """

    def __init__(self) -> None:
        self.factor = _FIRST_FACTOR
        self._level = _QUANTILE
        self._log_factor = math.log(_FIRST_FACTOR)
        self._newest: deque[float] = deque()
        self._sorted: list[float] = []

    def learn(self, log_ratio: float) -> None:
        """Observe a step by the logarithm of measured over predicted."""
        ratios = self._sorted
        level = self._level + _LEVEL_STEP * (_QUANTILE if log_ratio > self._log_factor else _QUANTILE - 1.0)
        self._level = level = min(max(level, 0.5), 1.0)
        self._newest.append(log_ratio)
        insort(ratios, log_ratio)
        if len(ratios) > _WINDOW:
            del ratios[bisect_left(ratios, self._newest.popleft())]
        place = level * (len(ratios) + 1) - 1.0
        below = int(place)
        if below < len(ratios) - 1:
            self._log_factor = ratios[below] + (ratios[below + 1] - ratios[below]) * (place - below)
        else:
            self._log_factor = ratios[-1] + (_MARGIN_OF_FEW if len(ratios) < _FEW else 0.0)
        self._log_factor = max(self._log_factor, 0.0)
        self.factor = math.exp(self._log_factor)


class Trend:
    """By how much steps of late were longer than the model says, where that lasts from step to step.

    An exponential mean of the deviations, times the share of it that the next step was found to show (a regression of
    each deviation on the mean before it): pure noise gives a share near 0, and no correction.
    """

    def __init__(self) -> None:
        self._mean_s = self._product = self._square = 0.0
        self.at_s = 1.0

    @property
    def offset_s(self) -> float:
        """Seconds that steps of about `at_s` seconds take more than the model says."""
        return self._mean_s * min(max(self._product / self._square, 0.0), 1.0) if self._square > 0.0 else 0.0

    def learn(self, deviation_s: float, predicted_s: float) -> None:
        """Observe a step.

        Args:
            deviation_s: measured minus predicted_s.
            predicted_s: by the model without this correction.
        """
        deviation_s = min(max(deviation_s, -_LARGEST * predicted_s), _LARGEST * predicted_s)
        self._product += _JUDGE * (deviation_s * self._mean_s - self._product)
        self._square += _JUDGE * (self._mean_s * self._mean_s - self._square)
        if predicted_s < self.at_s:
            self._mean_s *= predicted_s / self.at_s
        self.at_s = predicted_s
        self._mean_s += _BLEND * (deviation_s - self._mean_s)

    def reset(self) -> None:
        self._mean_s = self._product = self._square = 0.0


class Level:
    """By which factor all steps of late took longer than the model says, where that lasts from step to step.

    Neighbours on the same cores or a power limit slow every kind of step, for seconds or minutes. As Trend, with
    logarithms of ratios in place of seconds; a step counts for no more than one that is a spike.
    """

    def __init__(self) -> None:
        self._mean = self._product = self._square = 0.0

    @property
    def factor(self) -> float:
        """How many times as long as the model says the next step will take, > 0."""
        if self._square <= 0.0:
            return 1.0
        return math.exp(self._mean * min(max(self._product / self._square, 0.0), 1.0))

    def learn(self, log_ratio: float) -> None:
        """Observe a step by the logarithm of measured over predicted without this factor."""
        log_ratio = min(max(log_ratio, -_SPIKE), _SPIKE)
        self._product += _JUDGE * (log_ratio * self._mean - self._product)
        self._square += _JUDGE * (self._mean * self._mean - self._square)
        self._mean += _BLEND_LEVEL * (log_ratio - self._mean)

    def reset(self) -> None:
        self._mean = self._product = self._square = 0.0


def is_off(log_ratio: float) -> bool:
    return abs(log_ratio) > _LARGEST


def is_spike(log_ratio: float) -> bool:
    return log_ratio > _SPIKE


@dataclass(frozen=True, slots=True)
class Change:
    """A change of a device's speed.

    Attributes:
        ratio: by which factor steps have become longer.
        kinds: of the steps that did; None for all of them: no misjudged kind of step is off as far as that.
    """

    ratio: float
    kinds: frozenset[int] | None


class Drift:
    """Tells a device that has changed from a step that was disturbed.

    Changed: eight steps in a row took more than 1.6 times what was predicted, or sixteen were off by more than 10 % to
    the same side. Where errors fall to either side by chance, sixteen in a row do so once in 30,000 times. Within 64
    steps of well-known kinds after the device itself has said that it may have changed, three and six are enough.
    """

    def __init__(self) -> None:
        self._spikes = self._run = self._expected_for = 0
        self._log_ratio = 0.0
        self._kinds: set[int] = set()

    def learn(self, kind: int, log_ratio: float) -> Change | None:
        """Observe a step of a well-known kind that `is_off`.

        Args:
            kind: of the step.
            log_ratio: of measured to predicted.

        Returns:
            None as long as there is no sign of a change.
        """
        if log_ratio * self._log_ratio < 0.0:
            self.calm()
        else:
            self._expected_for -= 1
        self._spikes = self._spikes + 1 if is_spike(log_ratio) else 0
        self._run += 1
        self._log_ratio += log_ratio
        self._kinds.add(kind)
        expected = self._expected_for > 0
        spikes, off = (_EXPECTED_SPIKES, _EXPECTED_OFF_STEPS) if expected else (_SPIKES, _OFF_STEPS)
        if self._spikes < spikes and self._run < off:
            return None
        everywhere = self._spikes >= spikes
        change = Change(math.exp(self._log_ratio / self._run), None if everywhere else frozenset(self._kinds))
        self.calm()
        return change

    def expect(self) -> None:
        """The device says that it may have changed."""
        self._expected_for = _EXPECTED_FOR

    def calm(self) -> None:
        """A step took about as long as predicted: whatever went before was no change."""
        self._expected_for -= 1
        self._spikes, self._run, self._log_ratio = 0, 0, 0.0
        self._kinds.clear()
