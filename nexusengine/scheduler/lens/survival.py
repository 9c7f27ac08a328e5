"""Whether answers can be counted on to grow: then a young one may spend time that it has yet to gain."""

from __future__ import annotations

import math

import numpy as np

from nexusengine.arrays import I4

_MEMORY = 200.0  # answers
_LEAST_BEGUN = 10.0  # below so many remembered answers the share is anyone's guess
_ALMOST_ALL = 0.94


class Survival:
    """Learns from plan to plan what share of the answers that begin reach `tokens` tokens."""

    def __init__(self, tokens: int) -> None:
        self._tokens = tokens
        self._begun = self._reached = 0.0  # remembered with an exponential memory
        self._generated: I4 = np.zeros(0, np.int32)  # `[slots]`, when each was seen last

    def look(self, slots: I4, generated: I4, all_slots: int) -> None:
        """slots, generated `[D]`: sequences that decode in this step, and the tokens that they have so far. Where they
        are fewer than the slot had before, another sequence has it."""
        if len(self._generated) != all_slots:
            self._generated = np.zeros(all_slots, np.int32)
        before = self._generated[slots]
        new = (before == 0) | (generated < before)
        begun = int(np.count_nonzero(new))
        if begun:
            keep = math.exp(-begun / _MEMORY)
            self._begun, self._reached = keep * self._begun + begun, keep * self._reached
        grown = (generated >= self._tokens) & (new | (before < self._tokens))
        self._reached += int(np.count_nonzero(grown))
        self._generated[slots] = generated

    def sure_tokens(self) -> int:
        """What almost every answer reaches: `tokens`, or 0 as long as that is not known or not so."""
        known = self._begun >= _LEAST_BEGUN
        return self._tokens if known and self._reached >= _ALMOST_ALL * self._begun else 0
