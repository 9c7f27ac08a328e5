"""Protection of the longest prompts."""

from __future__ import annotations

import numpy as np
import pytest

from nexusengine.scheduler.lens.length_guard import LengthGuard


def test_the_guard_protects_those_of_the_longest_tenth_that_its_goal_counts_on() -> None:
    guard = LengthGuard(0.75)
    lengths = np.random.default_rng(1).permutation(np.arange(1, 1001)).tolist() * 3
    for tokens in lengths:
        guard.decided(tokens, False)
    low, high = guard.long_tokens
    assert (low, high) == pytest.approx((900, 975), rel=0.1)
    lengths_now = np.array([500, low + 1, high - 1, high + 1], np.int32)
    assert guard.protected(lengths_now).tolist() == [False, True, True, False]


def test_the_guard_protects_the_longest_when_they_are_lost_and_few_are() -> None:
    guard = LengthGuard(0.75)
    for i in range(400):
        guard.decided(i % 100 + 1, lost=i % 100 >= 96)
    assert guard.active
    assert guard.lost == pytest.approx(0.04, abs=0.02)


def test_the_guard_lets_go_when_too_many_are_lost_or_none_of_the_longest_is() -> None:
    many, short = LengthGuard(0.75), LengthGuard(0.75)
    for i in range(400):
        many.decided(i % 100 + 1, lost=i % 100 >= 70)
        short.decided(i % 100 + 1, lost=i % 100 < 5)
    assert not many.active
    assert not short.active
