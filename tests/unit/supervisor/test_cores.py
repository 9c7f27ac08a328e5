"""Which cores the CPU workers of one machine compute on."""

from __future__ import annotations

from pathlib import Path

import pytest

from nexusengine.supervisor.cores import numa_nodes, parse_cpulist, place_workers

TWO_NODES = [frozenset(range(4)), frozenset(range(4, 8))]


def test_two_workers_have_no_core_in_common() -> None:
    assert place_workers([1, 1], [0, 1], [frozenset({0, 1})]) == [(0,), (1,)]
    assert place_workers([2, 1], [3, 5, 6, 7], []) == [(3, 5), (6,)]


def test_a_worker_stays_within_a_node_where_it_fits() -> None:
    assert place_workers([2, 4], range(8), TWO_NODES) == [(4, 5), (0, 1, 2, 3)]
    assert place_workers([3], range(8), TWO_NODES) == [(0, 1, 2)]


def test_a_small_worker_leaves_room_for_others_in_the_emptier_node() -> None:
    assert place_workers([3, 1], range(8), TWO_NODES) == [(0, 1, 2), (3,)]


def test_a_worker_larger_than_a_node_reaches_into_another() -> None:
    assert place_workers([6, 2], range(8), TWO_NODES) == [(0, 1, 2, 3, 4, 5), (6, 7)]


@pytest.mark.parametrize("threads", [[None], [None, 2], [5, 4], [9]])
def test_nobody_is_tied_if_the_threads_are_unknown_or_too_many(threads: list[int | None]) -> None:
    assert place_workers(threads, range(8), TWO_NODES) == [()] * len(threads)


def test_a_single_worker_on_a_single_node_is_not_tied() -> None:
    assert place_workers([2], range(4), [frozenset(range(4))]) == [()]


def test_only_cores_that_may_be_used_are_given_out() -> None:
    assert place_workers([1, 2], [2, 5, 6], TWO_NODES) == [(2,), (5, 6)]


def test_nodes_are_read_in_the_order_of_their_numbers(tmp_path: Path) -> None:
    for name, text in {"node10": "8-9\n", "node2": "0-1,4\n", "node3": "\n"}.items():
        (tmp_path / name).mkdir()
        (tmp_path / name / "cpulist").write_text(text)
    assert numa_nodes(tmp_path) == [frozenset({0, 1, 4}), frozenset({8, 9})]
    assert numa_nodes(tmp_path / "missing") == []


def test_the_kernel_s_notation_of_cores_is_understood() -> None:
    assert parse_cpulist("0-3,8\n") == {0, 1, 2, 3, 8}
