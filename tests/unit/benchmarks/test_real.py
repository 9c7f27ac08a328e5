"""What the evaluation on the real CPU engine computes from its runs, and how it stops and disturbs servers."""

from __future__ import annotations

import itertools
import json
import math
import subprocess
import sys
from pathlib import Path
from typing import Any

import psutil
import pytest

from benchmarks import real_llama, real_sweep
from benchmarks.real import duration_s, in_turn
from benchmarks.real import main as real_main
from benchmarks.real_report import (
    BEGIN,
    END,
    Idle,
    Promise,
    ended_rps,
    filled,
    goodput_rps,
    judge_by,
    promise_of,
    promised,
    summary_of,
    tables,
    unpromised,
)
from benchmarks.real_systems import LLAMA, Server, neighbours, systems_of
from nexusengine.loadgen.http import Target
from nexusengine.loadgen.items import WorkItem
from nexusengine.loadgen.prompts import Prompts, bodies
from nexusengine.loadgen.record import Record
from nexusengine.loadgen.report import verdict

PROMISE = Promise(16, 0.116, 0.001, 0.05)


# ---- promises -------------------------------------------------------------------------------------------------------


def test_the_promise_is_the_idle_latency_times_its_factors_at_both_prompts() -> None:
    promise = promise_of(Idle(16, 0.030, 512, 0.526, 0.016), 5.0, 3.0)
    assert promise.slo(16).ttft_s == pytest.approx(5 * 0.030)
    assert promise.slo(512).ttft_s == pytest.approx(5 * 0.526)
    assert promise.slo(16).tpot_s == pytest.approx(3 * 0.016)


def test_the_promised_ttft_never_falls_with_the_prompt_nor_below_nothing() -> None:
    assert promise_of(Idle(16, 0.2, 512, 0.1, 0.01), 5.0, 3.0).slo(1000).ttft_s == pytest.approx(1.0)
    assert promise_of(Idle(16, 0.001, 512, 5.0, 0.01), 5.0, 3.0).slo(1).ttft_s == pytest.approx(0.005)


def test_a_server_that_is_told_no_slo_is_judged_by_the_same_promise() -> None:
    items = [WorkItem(0.0, 100, 3), WorkItem(0.0, 100, 3)]
    bare = [json.loads(b) for b in bodies(unpromised(items), Prompts(5000, 1), "m", seed=1, bounds=True)]
    told = [json.loads(b) for b in bodies(promised(items, PROMISE), Prompts(5000, 1), "m", seed=1, bounds=True)]
    assert [b["slo"] for b in bare] == ["none", "none"]
    assert told[0]["slo"] == {"ttft_ms": pytest.approx(200.0), "tpot_ms": pytest.approx(50.0)}
    assert [b["prompt"] for b in bare] == [b["prompt"] for b in told]
    quick = Record(unpromised(items)[0], 10.0, first_s=10.19, last_s=10.28, ended_s=10.28, output_tokens=3)
    slow = Record(unpromised(items)[1], 10.0, first_s=10.21, last_s=10.28, ended_s=10.28, output_tokens=3)
    assert verdict(slow).met
    judge_by([quick, slow], promised(items, PROMISE))
    assert [verdict(quick).met, verdict(slow).met] == [True, False]


# ---- figures --------------------------------------------------------------------------------------------------------


def test_capacity_is_what_ends_a_second_while_a_queue_stands() -> None:
    steady = [30.0 + 0.5 * i for i in range(40)]
    assert ended_rps(steady) == pytest.approx(2.0)
    with_a_slow_begin_and_a_long_end = [1.0, 2.0, *steady[3:37], 90.0, 95.0]
    assert ended_rps(with_a_slow_begin_and_a_long_end) == pytest.approx(2.0)


@pytest.mark.parametrize(
    ("points", "goodput"),
    [
        ([(1.0, 1.0), (2.0, 0.95), (3.0, 0.85)], 2.5),
        ([(3.0, 0.5), (1.0, 1.0)], 1.4),
        ([(1.0, 0.8), (2.0, 0.95), (3.0, 0.2)], 2.0 + 1.0 * 0.05 / 0.75),
        ([(1.0, 1.0), (2.0, 0.9)], 2.0),
        ([(1.0, 0.89), (2.0, 0.1)], None),
    ],
)
def test_goodput_lies_between_the_last_rate_that_holds_and_the_next(
    points: list[tuple[float, float]], goodput: float | None
) -> None:
    assert goodput_rps(points) == (goodput if goodput is None else pytest.approx(goodput))


def run(system: str, attainment: float, load: float = 0.8, **more: Any) -> dict[str, Any]:
    spread = {"p50": 100 * attainment, "p99": math.nan}
    return {
        "noise": "quiet",
        "layout": "cpu:2",
        "system": system,
        "load": load,
        "rate_rps": 2 * load,
        "offered": 10,
        "completed": 9,
        "attainment": attainment,
        "output_tokens_per_s": 50.0,
        "ttft_ms": spread,
        "tpot_ms": spread,
        **more,
    }


def test_figures_are_medians_over_rounds_with_the_least_and_the_most() -> None:
    runs = [run("a", 0.5), run("b", 0.2), run("a", 0.9), run("a", 0.8, load=1.2), run("a", 0.7)]
    rows = {(r["system"], r["load"]): r for r in summary_of(runs)}
    assert list(rows) == [("a", 0.8), ("b", 0.8), ("a", 1.2)]
    row = rows["a", 0.8]
    assert (row["attainment"], row["attainment_least"], row["attainment_most"]) == (0.7, 0.5, 0.9)
    assert (row["rounds"], row["requests"], row["completed"]) == (3, 30, 0.9)
    assert (row["ttft_ms_p50"], row["ttft_ms_p99"]) == (70.0, None)


RESULT = {
    "date": "2026-12-01 00:00",
    "machine": {"cpu": "a CPU", "cores": 2},
    "versions": {"nexusengine": "1", "llama-server": "build 2"},
    "settings": {"llama_settings": {}, "weights": "fp32", "scale": 8.0, "rounds": 1, "duration": 10.0},
    "promise": {"short_tokens": 16, "ttft_s": 0.1, "ttft_per_token_s": 0.001, "tpot_s": 0.05},
    "capacity_rps": {"quiet": 2.0},
    "took_s": 120.0,
}


def test_the_tables_show_the_server_of_others_beside_each_layout_and_every_goodput() -> None:
    runs = [run("lens", 0.95), run("lens", 0.85, load=1.2), run("lens", 0.95, layout="cpu:1,cpu:1")]
    shown = tables(RESULT | {"summary": summary_of([*runs, run(LLAMA, 0.5, layout="")])})
    assert shown.count("| llama-server | 0.8 (1.60/s) | 10 | 50.0 | 50..50 | 50 / - | 50 / - | 50.0 |") == 2
    assert "| quiet | cpu:2 | lens | 2.00 |" in shown
    assert "| quiet | cpu:1,cpu:1 | lens | >= 1.60 |" in shown
    assert "| quiet | any | llama-server | < 1.60 |" in shown


def test_a_result_is_shown_again_and_fills_the_page(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    page, file = tmp_path / "page.md", tmp_path / "r.json"
    page.write_text(f"before\n{BEGIN}\nold\n{END}\nafter\n")
    file.write_text(json.dumps(RESULT | {"summary": summary_of([run("lens", 0.95)])}))
    assert real_main(["--show", str(file), "--page", str(page)]) == 0
    assert "| lens | 0.8" in capsys.readouterr().out
    text = page.read_text()
    assert text.startswith("before\n")
    assert text.endswith("after\n")
    assert "| lens | 0.8" in text
    assert "old" not in text
    with pytest.raises(ValueError, match="no place for figures"):
        filled("a page", "figures")


def test_the_page_of_the_docs_has_a_place_for_the_figures() -> None:
    page = Path(__file__).parents[3] / "docs" / "evaluation-real.md"
    assert "| 42 |" in filled(page.read_text(), "| 42 |")


# ---- plans ----------------------------------------------------------------------------------------------------------


def test_systems_that_differ_in_what_requests_say_share_a_server() -> None:
    systems = systems_of(["cpu:2", "cpu:1,cpu:1"], "lens", "fcfs:budget=2048", ["quiet", "busy"])
    assert len(systems) == 8
    assert len({s.server for s in systems}) == 6
    assert [s.noise for s in systems if s.name == LLAMA] == ["quiet", "busy"]
    assert [s.name for s in systems if s.told] == ["lens + prism, SLO"] * 2
    assert systems[-1].name == LLAMA


def test_each_system_is_first_in_its_turn() -> None:
    systems = systems_of(["cpu:2"], "lens", "fcfs", ["quiet"])
    assert [in_turn(systems, n)[0] for n in range(5)] == [*systems, systems[0]]
    assert sorted(s.name for s in in_turn(systems, 2)) == sorted(s.name for s in systems)


def test_the_time_for_the_whole_is_divided_among_the_runs() -> None:
    assert 126 * (duration_s(33.0, 126) + 6.0) + 150.0 == pytest.approx(33 * 60)
    with pytest.raises(ValueError, match="too few for 1000 runs"):
        duration_s(33.0, 1000)


def test_llama_server_has_room_for_the_longest_request_in_every_slot() -> None:
    options = real_llama.server_options(real_llama.DEFAULTS | {"parallel": 8, "threads": 3}, Path("m.gguf"), 1024, 99)
    given = dict(itertools.pairwise(options))
    assert (given["--parallel"], given["--ctx-size"], given["--threads"]) == ("8", "8192", "3")


def test_threads_of_llama_server_wait_as_its_settings_say(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    assert not [k for k in real_llama.environment(real_llama.DEFAULTS) if k.startswith("OMP_")]
    assert real_llama.environment(real_llama.BY_NOISE["busy"])["OMP_WAIT_POLICY"] == "passive"


def test_a_sweep_puts_the_best_values_together_and_takes_what_kept_most() -> None:
    runs, base = [], real_llama.DEFAULTS
    for settings in real_sweep.one_at_a_time(base):
        better = settings["parallel"] == 16 or settings["wait"] == "passive"
        runs.append(run(json.dumps(settings), 0.9 if better else 0.6))
    assert real_sweep.together(base, runs) == real_llama.DEFAULTS | {"parallel": 16, "wait": "passive"}
    best = run(json.dumps(real_sweep.together(base, runs)), 0.8)
    assert real_sweep.chosen([*runs, best])["parallel"] == 16
    beside_others = real_sweep.one_at_a_time(real_llama.BY_NOISE["busy"])
    assert [s["wait"] for s in beside_others].count("active") == 1
    assert len(beside_others) == len(real_sweep.one_at_a_time(base))
    assert real_sweep.chosen([*runs, best | {"attainment": 0.95}]) == real_sweep.together(base, runs)


# ---- processes ------------------------------------------------------------------------------------------------------


def test_a_server_is_stopped_with_all_its_processes_and_goes_on() -> None:
    with subprocess.Popen([sys.executable, "-c", "input()"], stdin=subprocess.PIPE) as process:
        one = psutil.Process(process.pid)
        server = Server(Target("http://127.0.0.1:1"), None, [one])
        try:
            server.pause()
            assert one.status() == psutil.STATUS_STOPPED
        finally:
            server.resume()
        process.communicate(b"\n")
        assert process.returncode == 0
        server.pause()  # what has ended meanwhile is no fault


def test_neighbours_are_there_for_a_while_and_no_longer() -> None:
    before = set(psutil.Process().children())
    with neighbours(2):
        spinning = set(psutil.Process().children()) - before
        assert len(spinning) == 2
    assert not any(p.is_running() for p in spinning)
    with neighbours(0):
        assert set(psutil.Process().children()) <= before
