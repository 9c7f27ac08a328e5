"""The tables made of the cluster benchmark's rows: what is averaged with what."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from benchmarks.cluster_report import against_best, common_means, main, mean_table, prefix_table, system_of, usual


def row(router: str, load: float, seed: int, attainment: float, **more: Any) -> dict[str, Any]:
    told = {"scenario": "mixed", "engine": "lens", "prefix_hit_rate": 0.0}
    return told | {"router": router, "load": load, "seed": seed, "attainment": attainment} | more


def test_a_system_that_lacks_the_hard_points_does_not_gain_by_it() -> None:
    rows = [row("prism", 0.7, 1, 1.0), row("prism", 1.0, 1, 0.8), row("p2c", 0.7, 1, 0.9)]
    assert common_means(rows, system_of) == {("LENS + prism", "mixed"): (1.0, 1), ("LENS + p2c", "mixed"): (0.9, 1)}
    assert "| LENS + p2c | 90.0 |" in mean_table(rows, system_of, "engine + router")


def test_the_best_other_router_is_found_at_every_load_over_common_seeds() -> None:
    rows = [row("prism", 1.0, 1, 0.9), row("prism", 1.0, 2, 0.1), row("p2c", 1.0, 1, 0.92), row("lmetric", 1.0, 1, 0.5)]
    ((scenario, load, prism, best, name),) = against_best(rows)
    assert (scenario, load, name) == ("mixed", 1.0, "p2c")
    assert (prism, best) == pytest.approx((0.9, 0.92))
    assert against_best([row("prism", 1.0, 1, 0.9)]) == []


def test_hit_rates_are_compared_with_those_of_cache_aware() -> None:
    rows = [row("prism", 1.0, 1, 0.9, prefix_hit_rate=0.45), row("cache-aware", 1.0, 1, 0.8, prefix_hit_rate=0.5)]
    assert "| mixed | prism | 45.0 | 90.0 | 90.0 |" in prefix_table(rows)


def test_other_conditions_are_kept_apart_and_everything_is_printed(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    rows = [row(r, load, 1, 0.5 + 0.1 * load) for r in ("prism", "p2c") for load in (0.7, 1.0)]
    rows += [row("prism", 1.0, 1, 0.3, period_s=2.0, loss=0.2), row("prism", 1.0, 1, 0.25, prefix_hit_rate=0.5)]
    rows[-1]["scenario"] = "shared"
    assert len(usual(rows)) == 5
    file = tmp_path / "rows.jsonl"
    file.write_text("".join(json.dumps(r) + "\n" for r in rows))
    main([str(file)])
    out = capsys.readouterr().out
    assert "| LENS + prism, reports every 2000 ms, 20 % of reports lost | 30.0 |" in out
    assert "| LENS + prism, as usual | 60.0 |" in out
    assert "| LENS + prism | 58.5 |" in out
    assert "0 of 2 points are more than one below" in out
