"""How long outputs are at least, and how often slots come free."""

from __future__ import annotations

import numpy as np
import pytest

from nexusengine.scheduler.lens.estimators import OutputLengthFloor, SlotReleaseRate


def grown_to(lengths: list[int], tokens: int) -> OutputLengthFloor:
    """Answers of these lengths one after another in the same slot."""
    survival, slot = OutputLengthFloor(tokens), np.array([3], np.int32)
    for length in lengths:
        for generated in range(1, length + 1):
            survival.observe(slot, np.array([generated], np.int32), 8)
    return survival


def test_answers_are_sure_to_reach_what_almost_all_have_reached() -> None:
    assert grown_to([20] * 9, 20).floor_tokens() == 0  # too few to tell
    assert grown_to([20] * 11, 20).floor_tokens() == 20
    assert grown_to(([20] * 19 + [19]) * 5, 20).floor_tokens() == 20
    assert grown_to(([20] * 9 + [19]) * 10, 20).floor_tokens() == 0


def test_survival_forgets_answers_of_long_ago() -> None:
    assert grown_to([3] * 200 + [50] * 200, 20).floor_tokens() == 0
    assert grown_to([3] * 200 + [50] * 600, 20).floor_tokens() == 20


def test_tokens_that_pass_between_two_plans_are_counted() -> None:
    survival, slots = OutputLengthFloor(20), np.array([0, 5], np.int32)
    for _ in range(6):
        for generated in (2, 9, 27, 31):
            survival.observe(slots, np.array([generated, generated], np.int32), 8)
    assert survival.floor_tokens() == 20


def test_slots_come_free_as_often_as_running_requests_have_ended() -> None:
    releases = SlotReleaseRate()
    running = 100
    for step in range(200):  # one in a hundred ends every 10 ms: a slot is held for a second
        releases.observe(running - 1 if step else 0, 0.01 * step)
        releases.planned(running)
    assert releases.slot_wait_s(200) == pytest.approx(1.0 / 200)
    assert releases.slots_within(np.array([-1.0, 0.0, 0.5]), 3, 200) == pytest.approx([3.0, 3.0, 103.0])


def test_while_few_have_ended_slots_are_taken_to_be_no_obstacle() -> None:
    releases = SlotReleaseRate()
    releases.observe(0, 0.0)
    releases.planned(4)
    releases.observe(1, 0.1)
    assert releases.slot_wait_s(8) == 0.0
    assert releases.slots_within(np.array([0.0]), 0, 8).tolist() == [np.inf]
