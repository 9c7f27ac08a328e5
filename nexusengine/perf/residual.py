"""What the measured steps say of a model's errors: how far up they reach, and how long they last."""

from __future__ import annotations

import math
from bisect import bisect_left, insort
from collections import deque

_QUANTILE, _FIRST_FACTOR = 0.95, 1.2
_WINDOW, _LEVEL_STEP = 100, 0.01
_FEW, _MARGIN_OF_FEW = 19, 0.02  # of fewer than 19 the 95 % quantile is beyond the largest
_BLEND, _JUDGE = 0.3, 0.02
_LARGEST = 0.1


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
        """log_ratio: of measured to predicted."""
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
        self._mean_s = 0.0
        self._product = self._square = 0.0

    @property
    def offset_s(self) -> float:
        return self._mean_s * min(max(self._product / self._square, 0.0), 1.0) if self._square > 0.0 else 0.0

    def learn(self, deviation_s: float, predicted_s: float) -> None:
        """deviation_s: measured minus what the model says without this correction, predicted_s."""
        deviation_s = min(max(deviation_s, -_LARGEST * predicted_s), _LARGEST * predicted_s)
        self._product += _JUDGE * (deviation_s * self._mean_s - self._product)
        self._square += _JUDGE * (self._mean_s * self._mean_s - self._square)
        self._mean_s += _BLEND * (deviation_s - self._mean_s)

    def rescale(self, ratio: float) -> None:
        self._mean_s *= ratio
        self._product *= ratio * ratio
        self._square *= ratio * ratio
