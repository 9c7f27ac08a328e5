"""Commands that take a recorded trace: sim, plan, bench serve."""

from __future__ import annotations

import json
from argparse import Namespace
from pathlib import Path
from typing import Any

import msgspec
import pytest

from nexusengine.cli.main import main
from nexusengine.cli.recorded import fill, recording_of
from nexusengine.loadgen.items import items_of
from nexusengine.loadgen.prompts import Prompts, bodies
from nexusengine.recording import format as lines
from tests.support.recordings import SERVER, header, request, sample, worker, workload, write

# ---- commands -------------------------------------------------------------------------------------------------------


def run(capsys: pytest.CaptureFixture[str], *words: str) -> dict[str, Any]:
    assert main([*words, "--json"]) == 0
    printed: dict[str, Any] = json.loads(capsys.readouterr().out)
    return printed


def test_sim_takes_a_recorded_trace_with_the_settings_of_its_server(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = sample(tmp_path / "load.jsonl")
    spec = run(capsys, "sim", "run", "--trace", path)["spec"]
    assert (spec["engine"], spec["router"], spec["devices"]) == ("fcfs", "least-requests", "this")
    assert (spec["classes"], spec["prefix_caching"], spec["max_model_len"]) == ("recorded", True, 4096)
    assert spec["scheduler_cost_s"] == pytest.approx(0.002)
    assert spec["link_delay_s"] == pytest.approx(0.002)
    changed = run(
        capsys, "sim", "run", "--trace", path, "--engine", "lens", "--no-prefix-caching", "--classes", "batch"
    )
    assert (changed["spec"]["engine"], changed["spec"]["prefix_caching"]) == ("lens", False)
    assert list(changed["attainment_by_class"]) == ["batch"]


@pytest.mark.parametrize(
    ("served", "device", "model"),
    [
        ("smollm2-135m", "cpu:1", "smollm2-135m"),
        ("meta-llama/Llama-3.1-8B-Instruct", "cuda:0", "llama-3.1-8b"),
        ("Qwen3-30B-A3B-GGUF:Q4_K_M", "cuda:0", "qwen3-30b-a3b"),
        ("smollm2-135m", "emulated:h100", "llama-3.1-8b"),
        ("smollm2-135m", "emulated:h100/qwen3-32b", "qwen3-32b"),
        ("/models/Mine", "cpu", "mine"),
    ],
)
def test_other_devices_have_the_profile_of_the_model_that_was_served(
    tmp_path: Path, served: str, device: str, model: str
) -> None:
    server = msgspec.structs.replace(SERVER, model=served)
    workers = lines.Workers(at_s=0.0, workers=(worker("w0", device),))
    path = write(tmp_path / "load.jsonl", [header(server=server), workers, request(0)])
    args = Namespace(model=None)
    fill(args, recording_of(path), {"model": "usual"})
    assert args.model == model


def test_compare_sets_both_sides_beside_each_other(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = sample(tmp_path / "load.jsonl")
    found = run(capsys, "sim", "compare", "--trace", path, "--no-noise")
    assert found["requests"] == 40
    assert found["recorded"]["attainment_by_class"] == {"interactive": 1.0}
    assert found["recorded"]["tpot_ms"]["p50"] == 12.0
    assert found["recorded"]["by_worker"] == {"w0": 40}
    assert found["simulated"]["completed"] == 40
    mine = found["simulated"]["tpot_ms"]["p50"]
    assert found["difference"]["tpot_percent"]["p50"] == pytest.approx(100 * (mine / 12 - 1), abs=0.01)
    assert main(["sim", "compare", "--trace", path]) == 0
    assert "answered by w1" in capsys.readouterr().out
    plain = tmp_path / "plain.jsonl"
    plain.write_text('{"arrival_s": 0, "input_tokens": 5, "output_tokens": 5}\n')
    assert main(["sim", "compare", "--trace", str(plain), "--devices", "l4"]) == 1
    assert main(["sim", "compare", "--trace", path, "--duration", "3"]) == 1


def test_plan_answers_with_and_without_a_device(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = sample(tmp_path / "load.jsonl")
    words = ["plan", "--trace", path, "--devices", "this; this-w1; this:w0+l4", "--model", "llama-3.1-8b"]
    made = run(capsys, *words, "--no-head-room")
    assert [c["devices"] for c in made["candidates"]] == ["this", "this-w1", "this:w0,l4"]
    assert [len(c["metrics"]["workers"]) for c in made["candidates"]] == [2, 1, 2]
    assert made["spec"]["scheduler_cost_s"] == pytest.approx(0.002)
    lone = write(tmp_path / "lone.jsonl", [header(), lines.Workers(at_s=0.0, workers=(worker(),)), request(0)])
    assert main(["plan", "--trace", lone]) == 1
    assert "no rate" in capsys.readouterr().err
    assert main(["plan", "--trace", path, "--devices", "this:w9", "--no-head-room"]) == 1
    assert "w0, w1" in capsys.readouterr().err


def test_a_client_sends_what_was_recorded(tmp_path: Path) -> None:
    known = request(0, slo_class="interactive", slo=lines.Bounds(ttft_ms=550.0, tpot_ms=50.0), tenant="ab" * 8)
    shared = {"block_tokens": 16, "hash_ids": (7, 8, 9)}
    custom = request(1, slo_class="custom", slo=lines.Bounds(ttft_ms=700.0, tpot_ms=70.0), **shared)
    path = write(tmp_path / "load.jsonl", [header(), known, custom, request(2, **shared)])
    items = items_of(workload(path))
    first, second, third = map(json.loads, bodies(items, Prompts(10_000, 0), None, seed=0))
    assert (first["slo"], first["user"], len(first["prompt"]), first["max_tokens"]) == ("interactive", "ab" * 8, 50, 10)
    assert second["slo"] == {"ttft_ms": 700.0, "tpot_ms": 70.0}
    assert third["slo"] == "none"
    assert second["prompt"][:48] == third["prompt"][:48] != first["prompt"][:48]


def test_the_lines_survive_unknown_keys_of_later_versions() -> None:
    row = msgspec.to_builtins(request(0)) | {"new_in_2": [1]}
    assert lines.parse(row) == request(0)
