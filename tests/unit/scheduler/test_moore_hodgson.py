"""Which jobs are deferred so that as many others as possible are on time."""

from __future__ import annotations

import itertools

import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from nexusengine.scheduler.moore_hodgson import defer

jobs = st.lists(st.tuples(st.integers(1, 20), st.integers(0, 60)), max_size=9)


@given(jobs)
def test_no_choice_keeps_more_in_time_than_defer_does(jobs: list[tuple[int, int]]) -> None:
    jobs = sorted(jobs, key=lambda job: job[1])
    work, allowed = np.array([j[0] for j in jobs], float), np.array([j[1] for j in jobs], float)
    kept = ~defer(work, allowed)
    assert (np.cumsum(work[kept]) <= allowed[kept]).all()
    best = 0
    for size in range(len(jobs), -1, -1):
        if any(feasible(choice) for choice in itertools.combinations(jobs, size)):
            best = size
            break
    assert kept.sum() == best


def feasible(jobs: tuple[tuple[int, int], ...]) -> bool:
    done = 0
    for work, allowed in jobs:
        done += work
        if done > allowed:
            return False
    return True


def test_the_largest_of_the_lowest_rank_is_deferred() -> None:
    work, allowed = np.array([5.0, 4.0, 1.0]), np.array([10.0, 10.0, 6.0])
    assert defer(work, allowed).tolist() == [True, False, False]
    assert defer(work, allowed, [1, 0, 0]).tolist() == [False, True, False]


@given(jobs, st.lists(st.tuples(st.booleans(), st.integers(0, 4)), min_size=8, max_size=8))
def test_those_on_time_have_both_the_time_and_a_slot(
    jobs: list[tuple[int, int]], seats: list[tuple[bool, int]]
) -> None:
    jobs = sorted(jobs, key=lambda job: job[1])
    work, allowed = np.array([j[0] for j in jobs], float), np.array([j[1] for j in jobs], float)
    newcomers = np.resize([s[0] for s in seats], len(jobs))
    free = np.sort(np.resize([float(s[1]) for s in seats], len(jobs)))
    kept = ~defer(work, allowed, None, newcomers, free)
    assert (np.cumsum(work[kept]) <= allowed[kept]).all()
    assert (np.cumsum(newcomers[kept]) <= free[kept])[newcomers[kept]].all()


def test_where_slots_are_short_the_largest_waiting_request_is_deferred() -> None:
    work, allowed = np.array([9.0, 5.0, 4.0, 1.0]), np.full(4, 100.0)
    newcomers, seats = np.array([False, True, True, True]), np.array([2.0, 2.0, 2.0, 2.0])
    assert defer(work, allowed, None, newcomers, seats).tolist() == [False, True, False, False]


@given(jobs, st.lists(st.integers(0, 1), min_size=9, max_size=9))
def test_slots_for_all_change_nothing(jobs: list[tuple[int, int]], ranks: list[int]) -> None:
    """Three ways to the same answer: without slots, with time for all, and with both reckoned with."""
    work, allowed = np.array([j[0] for j in jobs], float), np.array([j[1] for j in jobs], float)
    rank, some = ranks[: len(jobs)], np.resize([True, False], len(jobs))
    plenty = np.full(len(jobs), 100.0)
    assert defer(work, allowed, rank, some, plenty).tolist() == defer(work, allowed, rank).tolist()
    assert not defer(work, 1e9 * np.ones(len(jobs)), rank, some, plenty).any()
