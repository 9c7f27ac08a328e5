"""The figures of predicted against measured TTFTs."""

from __future__ import annotations

import math
import subprocess
from typing import Any

import pytest

from benchmarks.prediction_error import busy, figures, row_of, table
from nexusengine.loadgen.items import WorkItem
from nexusengine.loadgen.record import Record

NEXUS: dict[str, Any] = {
    "predicted_ttft_ms": 110.0,
    "ttft_ms": 100.0,
    "queue_ms": 1.0,
    "cached_tokens": 0,
    "worker": "w0",
    "unattainable": False,
    "met": True,
    "missed": None,
    "class": "standard",
}


def row(**changed: Any) -> dict[str, Any]:
    found = row_of(Record(WorkItem(0.0, 50, 5), 0.0, nexus=NEXUS | changed))
    assert found is not None
    return {"load": "alone none", "devices": "cpu:1", "neighbours": 2, **found}


def test_errors_are_of_those_told_and_relative_to_what_was_measured() -> None:
    rows = [row(), row(predicted_ttft_ms=70.0), row(predicted_ttft_ms=300.0), row(predicted_ttft_ms=None)]
    f = figures(rows)
    assert (f["requests"], f["told"]) == (4, 0.75)
    assert [f["median"], f["worst"], f["bias"]] == pytest.approx([0.3, 2.0, 0.1])


def test_promises_called_out_of_reach_and_kept_all_the_same_are_counted() -> None:
    f = figures([row(unattainable=True, met=False), row(unattainable=True), row(met=False)])
    assert (f["unattainable"], f["wrongly"]) == (2, 1)


def test_where_nothing_was_told_there_is_no_error() -> None:
    assert math.isnan(figures([row(predicted_ttft_ms=None)])["median"])
    assert row_of(Record(WorkItem(0.0, 50, 5), 0.0, error="timeout", nexus=NEXUS)) is None


def test_the_table_has_a_line_for_each_load_and_one_that_judges_the_server() -> None:
    good = table([row(), row() | {"load": "burst 4 none"}]).splitlines()
    assert [line.split("  ")[0] for line in good[1:]] == ["cpu:1", "cpu:1", "cpu:1"]
    assert good[-1].endswith("within the goal")
    assert table([row(predicted_ttft_ms=120.0)]).endswith("beyond the goal")
    assert table([row(predicted_ttft_ms=None)]).endswith("beyond the goal"), "to tell nothing is not the goal"


def test_neighbours_end_with_the_measurement(monkeypatch: pytest.MonkeyPatch) -> None:
    started: list[subprocess.Popen[bytes]] = []
    popen = subprocess.Popen

    def spy(*args: Any, **options: Any) -> subprocess.Popen[bytes]:
        started.append(popen(*args, **options))
        return started[-1]

    monkeypatch.setattr(subprocess, "Popen", spy)
    with busy(2):
        assert [p.poll() for p in started] == [None, None]
    assert all(p.poll() is not None for p in started)
