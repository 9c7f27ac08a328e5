"""Replays of measured vLLM runs: reading them, the commands, uncertainty, and how near the simulator comes."""

import gzip
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from nexusengine.cli.main import main
from nexusengine.errors import ConfigError
from nexusengine.profiles.composed import ComposedProfile
from nexusengine.profiles.registry import load_profile
from nexusengine.sim.replay import compare, profile_for, replay
from nexusengine.sim.uncertainty import doubts, uncertainty
from nexusengine.sim.vllm_run import (
    Measured,
    Sent,
    VllmSettings,
    read_measured,
    read_settings,
    read_workload,
    settings_of,
)
from nexusengine.sim.vllm_runs import Run, runs_in
from tests.conftest import ROOT

RUNS = ROOT.parent / "shared" / "gpu_profiles" / "llmservingsim" / "measured_runs"


# ---- files -----------------------------------------------------------------------------------------------------------


def write_run(folder: Path, sent: list[Sent], measured: list[tuple[float, float, float]], meta: Any = None) -> None:
    lines = [
        {"arrival_s": s.arrival_s, "input_tokens": s.input_tokens, "output_tokens": s.output_tokens, "hash_ids": []}
        for s in sent
    ]
    (folder / "workload.jsonl").write_text("\n".join(map(json.dumps, lines)) + "\n")
    rows = [
        {
            "request_id": f"bench-{i}",
            "input_toks": s.input_tokens,
            "output_toks": s.output_tokens,
            "queued_ts": q,
            "first_token_ts": f,
            "last_token_ts": e,
        }
        for i, (s, (q, f, e)) in enumerate(zip(sent, measured, strict=True))
    ]
    with gzip.open(folder / "requests.jsonl.gz", "wt") as file:
        file.writelines(json.dumps(row) + "\n" for row in reversed(rows))
    if meta is not None:
        (folder / "meta.json").write_text(json.dumps(meta))


def test_a_run_is_read_in_the_order_it_was_sent(tmp_path: Path) -> None:
    sent = [Sent(0.0, 10, 3), Sent(1.0, 20, 1)]
    write_run(tmp_path, sent, [(5.0, 6.0, 8.0), (7.0, 7.5, 7.5)])
    assert read_workload(tmp_path / "workload.jsonl") == sent
    m = read_measured(tmp_path, sent)
    assert m.ttft_s.tolist() == [1.0, 0.5]
    assert m.tpot_s[0] == 1.0
    assert np.isnan(m.tpot_s[1])
    assert m.e2e_s.tolist() == [3.0, 0.5]
    assert read_settings(tmp_path) == VllmSettings()
    assert read_measured(tmp_path / "requests.jsonl.gz", sent).ttft_s.tolist() == [1.0, 0.5]


def test_token_ids_of_a_workload_become_equal_blocks_where_all_before_is_equal(tmp_path: Path) -> None:
    head, tail = list(range(32)), [7] * 16
    rows = [
        {"arrival_time_ns": 10**9 * i, "input_toks": len(ids), "output_toks": 4, "input_tok_ids": ids}
        for i, ids in enumerate([head + tail, head + [1] * 16, tail + head])
    ]
    (tmp_path / "w.jsonl").write_text("\n".join(map(json.dumps, rows)))
    a, b, c = read_workload(tmp_path / "w.jsonl")
    assert a.arrival_s == 0.0
    assert b.arrival_s == 1.0
    assert a.blocks[:2] == b.blocks[:2]
    assert a.blocks[2] != b.blocks[2]
    assert not set(c.blocks) & set(a.blocks)


def test_settings_are_those_the_engine_resolved_before_those_it_was_given() -> None:
    meta = {
        "engine_kwargs": {"max_num_seqs": 128, "max_num_batched_tokens": 2048, "max_model_len": None},
        "kv_cache": {"num_gpu_blocks": 2501, "block_size": 16},
        "resolved_config": {
            "scheduler_config": {"async_scheduling": False, "max_num_batched_tokens": 4096},
            "cache_config": {"enable_prefix_caching": False},
            "model_config": {"max_model_len": 8192, "enforce_eager": True},
            "compilation_config": {"cudagraph_capture_sizes": [2, 1, 4]},
        },
    }
    s = settings_of(meta)
    assert (s.max_num_seqs, s.max_num_batched_tokens, s.max_model_len, s.kv_tokens) == (128, 4096, 8192, 40_000)
    assert not s.async_scheduling
    assert not s.enable_prefix_caching
    assert s.enforce_eager
    assert s.cudagraph_capture_sizes == (1, 2, 4)
    assert settings_of({}) == VllmSettings()


@pytest.mark.parametrize(
    ("workload", "said"),
    [("", "no request"), ("[1]\n", "not an object"), ('{"a": 1}\n', "line 1"), ("x\n", "not JSON lines"),
     ('{"arrival_s": 0, "input_tokens": 0, "output_tokens": 1}\n', "at least one token")],
)  # fmt: skip
def test_a_wrong_workload_is_refused(tmp_path: Path, workload: str, said: str) -> None:
    (tmp_path / "w.jsonl").write_text(workload)
    with pytest.raises(ConfigError, match=said):
        read_workload(tmp_path / "w.jsonl")


def test_measurements_of_another_workload_are_refused(tmp_path: Path) -> None:
    sent = [Sent(0.0, 10, 3)]
    write_run(tmp_path, sent, [(5.0, 6.0, 8.0)])
    with pytest.raises(ConfigError, match="1 requests, the workload has 2"):
        read_measured(tmp_path, sent * 2)
    with pytest.raises(ConfigError, match="bench-0 has 10 \\+ 3 tokens"):
        read_measured(tmp_path, [Sent(0.0, 11, 3)])
    with pytest.raises(ConfigError, match=r"no requests\.jsonl"):
        read_measured(ROOT / "scripts", sent)


def test_errors_are_signed_and_in_percent() -> None:
    ones = np.ones(4)
    errors = compare(Measured(1.1 * ones, 0.9 * ones, ones), Measured(ones, ones, ones))
    assert errors["ttft_mean_pct"] == pytest.approx(10.0)
    assert errors["tpot_p90_pct"] == pytest.approx(-10.0)
    assert errors["e2e_p99_pct"] == 0.0
    assert errors["ttft_p50_ms"] == pytest.approx(1100.0)


def test_the_command_replays_a_run(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    sent = [Sent(0.1 * i, 200, 20) for i in range(10)]
    simulated = replay(load_profile("h100"), sent, VllmSettings(max_num_seqs=64)).simulated
    rows = [(0.0, float(a), float(b)) for a, b in zip(simulated.ttft_s, simulated.e2e_s, strict=True)]
    write_run(tmp_path, sent, rows, {"engine_kwargs": {"max_num_seqs": 64}})
    files = ["--workload", str(tmp_path / "workload.jsonl"), "--measured", str(tmp_path), "--no-uncertainty"]
    assert main(["sim", "replay", "--profile", "h100/llama-3.1-8b", *files, "--json"]) == 0
    out = json.loads(capsys.readouterr().out)
    names = [f"{what}_{which}_pct" for what in ("ttft", "tpot", "e2e") for which in ("mean", "p50", "p90", "p99")]
    assert [out[name] for name in names] == pytest.approx([0.0] * 12, abs=0.01)
    assert out["settings"]["max_num_seqs"] == 64
    assert main(["sim", "replay", "--profile", "h100/llama-3.1-8b", *files]) == 0
    assert "ttft_mean" in capsys.readouterr().out


def test_the_command_replays_all_runs_of_a_folder(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    short, long = [Sent(0.1 * i, 200, 20) for i in range(10)], [Sent(0.3 * i, 900, 10) for i in range(10)]
    settings = {"engine_kwargs": {"max_num_seqs": 64}}
    for folder, sent in (("H100/Llama-3.1-8B", short), ("RTX4090/Llama-3.1-8B-Instruct", long)):
        at = tmp_path / folder
        at.mkdir(parents=True)
        spec = "h100/llama-3.1-8b" if sent is short else "rtx4090/llama-3.1-8b"
        simulated = replay(load_profile(spec), sent, VllmSettings(max_num_seqs=64)).simulated
        rows = [(0.0, float(a), 1.01 * float(b)) for a, b in zip(simulated.ttft_s, simulated.e2e_s, strict=True)]
        write_run(at, sent, rows, settings)
        (at / "workload.jsonl").rename(tmp_path / f"workload_{at.parent.name}.jsonl")
    assert [run.profile for run in runs_in(tmp_path)] == ["h100/llama-3.1-8b", "rtx4090/llama-3.1-8b"]
    assert main(["sim", "replay", "--runs", str(tmp_path), "--json"]) == 0
    out = json.loads(capsys.readouterr().out)
    assert set(out) == {"H100/Llama-3.1-8B", "RTX4090/Llama-3.1-8B-Instruct"}
    for found in out.values():
        assert found["ttft_mean_pct"] == pytest.approx(0.0, abs=0.01)
        assert found["e2e_mean_pct"] == pytest.approx(-0.99, abs=0.05)
        of_e2e = found["uncertainty_pct"]["e2e_mean"]
        assert of_e2e["all"] == pytest.approx(
            np.sqrt(sum(v * v for name, v in of_e2e.items() if name != "all")), abs=0.02
        )
    measured, composed = (out[k]["uncertainty_pct"]["e2e_mean"] for k in reversed(list(out)))
    assert composed["kernels"] > measured["kernels"] > 0
    assert main(["sim", "replay", "--runs", str(tmp_path), "--no-uncertainty"]) == 0
    table = capsys.readouterr().out
    assert "H100/Llama-3.1-8B" in table
    assert "ttft_mean" in table


@pytest.mark.parametrize(
    ("given", "said"),
    [
        ([], "--profile, --workload, --measured, or --runs"),
        (["--runs", "X", "--profile", "h100"], "give it alone"),
        (["--runs", "X"], "no runs in it"),
    ],
)
def test_what_to_replay_must_be_said_in_one_way(
    given: list[str], said: str, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    given = [str(tmp_path) if word == "X" else word for word in given]
    assert main(["sim", "replay", *given]) == 1
    assert said in capsys.readouterr().err


def test_a_run_of_an_unknown_model_or_workload_is_refused(tmp_path: Path) -> None:
    at = tmp_path / "H100" / "Foo-7B"
    at.mkdir(parents=True)
    write_run(at, [Sent(0.0, 10, 3)], [(5.0, 6.0, 8.0)])
    (at / "workload.jsonl").rename(tmp_path / "workload_a.jsonl")
    [run] = runs_in(tmp_path)
    with pytest.raises(ConfigError, match="foo-7b"):
        profile_for(run.profile, VllmSettings())
    at = at.rename(tmp_path / "H100" / "Qwen3-8B")
    [run] = runs_in(tmp_path)
    assert run.read()[0] == [Sent(0.0, 10, 3)]
    (tmp_path / "workload_a.jsonl").write_text('{"arrival_s": 0, "input_tokens": 11, "output_tokens": 3}\n')
    with pytest.raises(ConfigError, match="none of 1 workload files is its own"):
        run.read()


# ---- uncertainty -----------------------------------------------------------------------------------------------------


def test_only_parts_that_a_run_has_are_doubted() -> None:
    def names(profile: str, sent: list[Sent], **settings: Any) -> list[str]:
        return [doubt.name for doubt in doubts(load_profile(profile), sent, VllmSettings(**settings))]

    few = [Sent(0.0, 100, 10)] * 3
    assert names("rtx4090/llama-3.1-8b", few, kv_tokens=1000) == ["kernels", "attention", "host"]
    assert names("rtx4090/llama-3.1-8b", few) == ["kernels", "attention", "host", "KV capacity"]
    assert names("rtxpro6000/qwen3-30b-a3b", few, data_parallel_size=2, kv_tokens=1000) == [
        "kernels", "attention", "exchange", "host"
    ]  # fmt: skip
    assert "beyond the tables" in names("rtx4090/llama-3.1-8b", [Sent(0.0, 20_000, 10)])
    assert "beyond the tables" in names("rtx4090/llama-3.1-8b", few, max_num_batched_tokens=8192)
    assert names("h100/qwq-32b-fp8", few, kv_tokens=1000) == ["kernels", "host"]


def test_uncertainty_is_what_the_parts_shift_a_figure_by() -> None:
    profile, settings = load_profile("rtx4090/llama-3.1-8b"), VllmSettings(max_num_seqs=8, kv_tokens=50_000)
    sent = [Sent(10.0 * i, 500, 40) for i in range(4)]  # one at a time: nothing waits
    found = uncertainty(profile, sent, settings, replay(profile, sent, settings))
    tpot = found["tpot_mean"]
    decode_s = profile.decode_run_s(np.array([500], np.int32), 39).mean()
    assert isinstance(profile, ComposedProfile)
    attention = profile.layers * profile.attention.decode_run_s(
        1, np.arange(501.0, 540.0), np.arange(501.0, 540.0)
    ).mean()  # fmt: skip
    assert tpot["kernels"] == pytest.approx(3.0 * (1 - attention / decode_s), abs=0.05)
    assert tpot["attention"] == pytest.approx(5.0 * attention / decode_s, abs=0.05)
    assert tpot["host"] == 0.0
    assert found["ttft_mean"]["host"] > 1.0
    assert 0.0 < tpot["scatter"] < 2.0


# ---- the measured runs -----------------------------------------------------------------------------------------------


BOUNDS = {"ttft": 5.0, "tpot": 2.0, "e2e": 3.0}
"""Percent, of means and medians."""


@pytest.mark.skipif(not RUNS.exists(), reason="../shared/gpu_profiles is not here")
@pytest.mark.parametrize("run", runs_in(RUNS) if RUNS.exists() else [], ids=str)
def test_measured_runs_are_met(run: Run) -> None:
    sent, settings, measured = run.read()
    errors = compare(replay(profile_for(run.profile, settings), sent, settings).simulated, measured)
    for what, most in BOUNDS.items():
        for which in ("mean", "p50"):
            assert abs(errors[f"{what}_{which}_pct"]) <= most, (what, which, errors)
