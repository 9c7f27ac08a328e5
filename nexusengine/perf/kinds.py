"""Kinds of step (strata), by which the online model keeps what it has learned, and recent errors by kind."""

from __future__ import annotations

import math
from bisect import bisect_left
from dataclasses import dataclass

from nexusengine.perf.features import StepFeatures

_DECODE_EDGES, _MIXED_EDGES = (8, 32, 128), (64, 128, 256, 512, 1024)
DECODE_KINDS = len(_DECODE_EDGES) + 1
STRATA = DECODE_KINDS + len(_MIXED_EDGES) + 1
_MEMORY = 32
_MOST = 1.0


def stratum(f: StepFeatures) -> int:
    """Kind of step: decode-only ones by octave of tokens, then mixed ones by octave."""
    if not f.prefills:
        return bisect_left(_DECODE_EDGES, f.tokens)
    return DECODE_KINDS + bisect_left(_MIXED_EDGES, f.tokens)


@dataclass(frozen=True, slots=True)
class RecentError:
    """How well steps of one kind were predicted of late, each before it was learned from.

    Attributes:
        steps: of that kind that were measured since the start, calibration included.
        relative: running mean of |predicted - measured| / measured over about the last 32 of them, where a single step
            counts for 1 at most; infinite before the first.
    """

    steps: int = 0
    relative: float = math.inf


class RecentErrors:
    """Running means of absolute relative errors, by kind of step."""

    def __init__(self) -> None:
        self._steps = [0] * STRATA
        self._relative = [math.inf] * STRATA

    def learn(self, kind: int, log_ratio: float) -> None:
        """Count a step by its `stratum` and the logarithm of measured over predicted."""
        error = min(abs(math.exp(-log_ratio) - 1.0), _MOST) if log_ratio > -1.0 else _MOST
        self._steps[kind] = n = self._steps[kind] + 1
        mean = self._relative[kind] if n > 1 else error
        self._relative[kind] = mean + (error - mean) / min(n, _MEMORY)

    def of(self, features: StepFeatures) -> RecentError:
        kind = stratum(features)
        return RecentError(self._steps[kind], self._relative[kind])
