"""The order in which waiting requests are taken."""

from __future__ import annotations

import numpy as np

from nexusengine.scheduler.lens.select import by_priority


def test_priority_counts_within_a_class_only() -> None:
    order = np.array([0, 1, 2, 3], np.int32)
    tpot_s, priority = np.array([0.05, 0.5, 0.05, 0.5]), np.array([0, 0, 5, 9], np.int32)
    assert by_priority(order, tpot_s, priority).tolist() == [2, 3, 0, 1]
    assert by_priority(order, tpot_s, np.zeros(4, np.int32)).tolist() == [0, 1, 2, 3]
