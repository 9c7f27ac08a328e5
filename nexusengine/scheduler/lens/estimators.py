"""What LENS learns of the traffic while it plans."""

from __future__ import annotations

import math

import numpy as np

from nexusengine.arrays import F8, I4

_MEMORY_ANSWERS = 200.0
_LEAST_ANSWERS = 10.0  # below so many remembered answers the share is anyone's guess
_ALMOST_ALL = 0.94
_MEMORY_S = 2.0
_LEAST_ENDED = 8.0  # below so many remembered ends the rate is anyone's guess


class OutputLengthFloor:
    """The length that almost every answer reaches.

    An early decode may spend what it is yet to gain until then. Learns from plan to plan what share of the answers that
    begin reach `tokens` tokens.
    """

    def __init__(self, tokens: int) -> None:
        self._tokens = tokens
        self._seen = self._reached = 0.0  # remembered with an exponential memory
        self._generated: I4 = np.zeros(0, np.int32)  # `[slots]`, when each was seen last

    def observe(self, slots: I4, generated: I4, all_slots: int) -> None:
        """Take in how far the answers of this step have come.

        Args:
            slots: `[D]`, sequences that decode in this step.
            generated: `[D]`, tokens that they have so far; where they are fewer than the slot had before, another
                sequence has it.
            all_slots: how many there are.
        """
        if len(self._generated) != all_slots:
            self._generated = np.zeros(all_slots, np.int32)
        before = self._generated[slots]
        self._generated[slots] = generated
        below, another = before < self._tokens, generated < before
        if not np.count_nonzero(below | another):
            return
        new = (before == 0) | another
        new_answers = int(np.count_nonzero(new))
        if new_answers:
            keep = math.exp(-new_answers / _MEMORY_ANSWERS)
            self._seen, self._reached = keep * self._seen + new_answers, keep * self._reached
        self._reached += int(np.count_nonzero((generated >= self._tokens) & (new | below)))

    def floor_tokens(self) -> int:
        """What almost every answer reaches: `tokens`, or 0 as long as that is not known or not so."""
        known = self._seen >= _LEAST_ANSWERS
        return self._tokens if known and self._reached >= _ALMOST_ALL * self._seen else 0


class SlotReleaseRate:
    """How fast running slots come free.

    Once all are taken, this, and not the time for prompts, is what waiting requests wait for. Learns from plan to plan
    how often one of the running sequences ends.
    """

    def __init__(self) -> None:
        self._ended = self._slot_s = 0.0  # remembered with an exponential memory
        self._running, self._planned_s = 0, -math.inf

    def observe(self, running: int, now: float) -> None:
        """running: sequences with a slot before this plan; those missing since `planned` have ended."""
        passed_s = now - self._planned_s
        if self._running and passed_s > 0.0:
            keep = math.exp(-passed_s / _MEMORY_S)
            self._ended = keep * self._ended + max(self._running - running, 0)
            self._slot_s = keep * self._slot_s + self._running * passed_s
        self._planned_s = now

    def planned(self, running: int) -> None:
        """running: sequences with a slot after this plan."""
        self._running = running

    def slot_wait_s(self, max_running: int) -> float:
        """Seconds until a slot comes free while all are taken; 0 if that is not known."""
        return self._slot_s / (self._ended * max_running) if self._ended >= _LEAST_ENDED else 0.0

    def slots_within(self, time_s: F8, free: int, max_running: int) -> F8:
        """How many slots waiting requests can take within `time_s [N]`. free: of all max_running, now."""
        slot_wait_s = self.slot_wait_s(max_running)
        if not slot_wait_s:
            return np.full(len(time_s), np.inf)
        within: F8 = free + np.maximum(time_s, 0.0) / slot_wait_s
        return within
