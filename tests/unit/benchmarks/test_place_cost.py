"""The placement benchmark: that it runs; what it measures is not a test."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from benchmarks.place_cost import main, place_all


def test_it_prints_and_writes_a_row_for_each_policy_and_number_of_workers(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    file = tmp_path / "out.json"
    options = ["--policies", "prism,lmetric", "--workers", "2,4", "--pending", "8", "--requests", "20"]
    main([*options, "--repeats", "2", "--json", str(file)])
    rows = json.loads(file.read_text())
    assert [(r["policy"], r["workers"]) for r in rows] == [("prism", 2), ("prism", 4), ("lmetric", 2), ("lmetric", 4)]
    assert all(0.0 < r["policy_p50_us"] <= r["policy_p99_us"] for r in rows)
    assert all(r["policy_p50_us"] < r["router_p50_us"] for r in rows), "the router does that and more"
    assert len(capsys.readouterr().out.splitlines()) == 1 + len(rows)


def test_each_request_is_timed_once_and_reports_fall_between_them() -> None:
    policy_s, router_s, digest_s = place_all("prism", workers=2, pending=8, requests=20, reports=0.5)
    assert len(policy_s) == len(router_s) == 20
    assert (policy_s < router_s).all()
    assert (digest_s > 0.0).sum() == 10
