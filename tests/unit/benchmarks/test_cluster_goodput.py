"""The search for a cluster's goodput: what is searched again and what the table says."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from benchmarks import cluster_goodput
from benchmarks.cluster_goodput import main, table


def row(engine: str, router: str, rps: float) -> dict[str, Any]:
    return {
        "scenario": "long",
        "engine": engine,
        "router": router,
        "seeds": "1-2",
        "duration_s": 60.0,
        "longest_decile": 0.75,
        "goodput_rps": rps,
    }


def test_the_table_says_how_many_times_the_goodput_of_each_system_ours_is() -> None:
    lines = table([row("lens", "prism", 6.0), row("fcfs", "p2c", 1.5), row("fcfs", "round-robin", 0.0)]).splitlines()
    assert lines[2] == "| long | lens + prism | 75 % | 6 | 1.0x |"
    assert lines[3] == "| long | fcfs + p2c | 75 % | 1.5 | 4.0x |"
    assert lines[4] == "| long | fcfs + round-robin | 75 % | 0 | it is zero |"


def test_what_the_file_holds_is_not_searched_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file = tmp_path / "goodput.jsonl"
    file.write_text(json.dumps(row("lens", "prism", 6.0)) + "\n")
    searched = []

    def search(args: Any, system: str, longest_decile: float) -> dict[str, Any]:
        searched.append(system)
        engine, router = system.split("/")
        return row(engine, router, 2.0)

    monkeypatch.setattr(cluster_goodput, "search", search)
    main(["--traces", ".", "--systems", "lens/prism", "fcfs/p2c", "--seeds", "1-2", "--json", str(file)])
    assert searched == ["fcfs/p2c"]
    assert len(file.read_text().splitlines()) == 2
