"""Replays of measured vLLM runs: the pipeline of steps, engines that step together, reading a run, how near it is."""

import gzip
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from nexusengine.cli.main import main
from nexusengine.errors import ConfigError
from nexusengine.profiles.composed import ComposedProfile
from nexusengine.profiles.links import LINKS, Link
from nexusengine.profiles.registry import load_profile
from nexusengine.sim.replay import Balancer, compare, profile_for, replay
from nexusengine.sim.uncertainty import doubts, uncertainty
from nexusengine.sim.vllm_run import (
    Measured,
    Sent,
    VllmSettings,
    graph_sizes,
    read_measured,
    read_settings,
    read_workload,
    settings_of,
)
from nexusengine.sim.vllm_runs import Run, runs_in
from nexusengine.sim.vllm_steps import HOST, Factors, Host, graph_rows, step_cost
from tests.conftest import ROOT
from tests.sim.fakes import FormulaProfile

RUNS = ROOT.parent / "shared" / "gpu_profiles" / "llmservingsim" / "measured_runs"
NO_HOST = Host(0.0, 1.0)
PROFILE = FormulaProfile()


def step_s(*rows: tuple[int, int]) -> float:
    """Of (count, context) rows."""
    counts, contexts = (np.array(column, np.int32) for column in zip(*rows, strict=True))
    return PROFILE.step_s(counts, contexts)


def run(sent: list[Sent], **settings: Any) -> Measured:
    return replay(PROFILE, sent, VllmSettings(**settings), NO_HOST).simulated


# ---- one step ahead --------------------------------------------------------------------------------------------------


def test_an_idle_engine_computes_at_once() -> None:
    m = run([Sent(1.0, 100, 3)])
    first = step_s((100, 0))
    assert m.ttft_s[0] == pytest.approx(first)
    assert m.e2e_s[0] == pytest.approx(first + step_s((1, 100)) + step_s((1, 101)))


def test_what_arrives_during_a_step_is_computed_in_the_step_after_next() -> None:
    sent = [Sent(0.0, 100, 50), Sent(step_s((100, 0)) + 1e-4, 60, 2)]  # it arrives in the first decode step
    m = run(sent)
    assert m.ttft_s[1] == pytest.approx(step_s((1, 101)) + step_s((1, 102), (60, 0)))
    at_once = run(sent, async_scheduling=False)
    assert at_once.ttft_s[1] == pytest.approx(step_s((1, 101), (60, 0)))


def test_the_seat_of_a_request_that_ended_is_free_for_the_step_after_next() -> None:
    sent = [Sent(0.0, 50, 3), Sent(0.0, 50, 30), Sent(0.0, 50, 2)]
    m = run(sent, max_num_seqs=2)  # the first begins alone, the others are taken in at the end of its step
    steps = [step_s((1, 50)), step_s((1, 51), (50, 0))]  # here the first ends
    steps += [step_s((1, 50)), step_s((1, 51), (50, 0))]  # planned with its seat still taken; and then without
    assert m.ttft_s[2] == pytest.approx(sum(steps))
    at_once = run(sent, max_num_seqs=2, async_scheduling=False)
    steps = [step_s((1, 50), (50, 0)), step_s((1, 51), (1, 50)), step_s((1, 51), (50, 0))]
    assert at_once.ttft_s[2] == pytest.approx(sum(steps))


def test_the_last_one_ends_without_a_step_for_nobody() -> None:
    result = replay(PROFILE, [Sent(0.0, 10, 5), Sent(9.0, 10, 5)], VllmSettings(), NO_HOST)
    assert result.steps == 10


def test_a_seat_that_only_ended_ones_hold_is_given_on_without_an_idle_step() -> None:
    m = run([Sent(0.0, 50, 2), Sent(0.001, 50, 2)], max_num_seqs=1)
    first_s = step_s((50, 0)) + step_s((1, 50))
    assert m.e2e_s[0] == pytest.approx(first_s)
    assert m.ttft_s[1] == pytest.approx(first_s - step_s((50, 0)) + step_s((50, 0)))


def test_long_prompts_are_cut_at_the_budget() -> None:
    m = run([Sent(0.0, 3000, 1)], max_num_batched_tokens=2048)
    assert m.ttft_s[0] == pytest.approx(step_s((2048, 0)) + step_s((952, 2048)))
    assert np.isnan(m.tpot_s[0])


def test_an_equal_beginning_is_not_computed_twice() -> None:
    blocks = tuple(range(6))
    m = run([Sent(0.0, 100, 2, blocks), Sent(5.0, 100, 2, blocks)])
    assert m.ttft_s[1] == pytest.approx(step_s((4, 96)))
    assert run([Sent(0.0, 100, 2, blocks), Sent(5.0, 100, 2, blocks)], enable_prefix_caching=False).ttft_s[
        1
    ] == pytest.approx(step_s((100, 0)))


def test_a_short_cache_makes_requests_give_way_and_all_end() -> None:
    rng = np.random.default_rng(1)
    sent = [Sent(float(t), int(i), int(o)) for t, i, o in zip(
        np.cumsum(rng.exponential(0.02, 80)), rng.integers(10, 300, 80), rng.integers(1, 200, 80), strict=True
    )]  # fmt: skip
    result = replay(PROFILE, sent, VllmSettings(kv_tokens=2000), NO_HOST)
    assert result.preemptions > 0
    assert np.isfinite(result.simulated.e2e_s).all()
    roomy = replay(PROFILE, sent, VllmSettings(kv_tokens=200_000), NO_HOST)
    assert roomy.preemptions == 0
    assert roomy.simulated.e2e_s.mean() < result.simulated.e2e_s.mean()


def test_a_request_that_can_never_fit_is_named() -> None:
    with pytest.raises(ConfigError, match="5000 \\+ 10 tokens"):
        run([Sent(0.0, 5000, 10)], kv_tokens=2000)


def test_a_step_with_a_chunk_costs_what_the_host_adds() -> None:
    m = replay(PROFILE, [Sent(0.0, 100, 2)], VllmSettings(), Host(0.002, 1.1)).simulated
    assert m.ttft_s[0] == pytest.approx(0.002 + 1.1 * step_s((100, 0)))
    assert m.tpot_s[0] == pytest.approx(step_s((1, 100)))
    assert HOST.launch_s <= 0.002
    assert HOST.sustained <= 1.05


# ---- several engines -------------------------------------------------------------------------------------------------


def test_independent_engines_share_the_requests() -> None:
    sent = [Sent(0.0, 100, 50) for _ in range(8)]
    two, one = run(sent, data_parallel_size=2), run(sent)
    assert two.ttft_s.max() < one.ttft_s.max()


def test_the_balancer_counts_what_it_has_sent_until_it_hears_anew() -> None:
    class Engine:
        def __init__(self, waiting: int, running: int) -> None:
            self.waiting, self.running = waiting, running

    balancer = Balancer([Engine(0, 9), Engine(1, 4)])  # type: ignore[list-item]
    assert [balancer.choose(0.01 * i) for i in range(3)] == [1, 0, 1]
    engines = [Engine(0, 0), Engine(0, 0)]
    fresh = Balancer(engines)  # type: ignore[arg-type]
    assert [fresh.choose(0.0), fresh.choose(0.0), fresh.choose(0.0)] == [0, 1, 0]
    engines[0].running = 100
    assert fresh.choose(0.2) == 1


def batch(*rows: tuple[int, int]) -> tuple[np.ndarray, np.ndarray]:
    """Of (count, context) rows."""
    counts, contexts = (np.array(column, np.int32) for column in zip(*rows, strict=True))
    return counts, contexts


def test_engines_with_experts_take_the_slowest_and_the_experts_of_all() -> None:
    p = load_profile("rtxpro6000/qwen3-30b-a3b")
    cost = step_cost(p, engines=2, link=LINKS["rtxpro6000"], host=NO_HOST)
    decodes = batch(*[(1, 1000)] * 64)
    chunk = batch((2048, 0))
    alone, both = cost([decodes]), cost([decodes, decodes])
    assert alone < both < 1.2 * alone  # the same layers, more tokens for the experts
    assert cost([decodes, chunk]) > cost([chunk])
    assert cost([chunk, decodes]) == pytest.approx(cost([decodes, chunk]))


def test_engines_with_experts_exchange_what_all_of_them_have() -> None:
    """Collectives were measured with equal parts: of unequal ones the total counts."""
    p = load_profile("rtxpro6000/qwen3-30b-a3b")
    assert isinstance(p, ComposedProfile)
    free = Link((1.0, 2.0), (0.0, 0.0), (0.0, 0.0), (0.0, 0.0))
    link = LINKS["rtxpro6000"]
    large, small = batch((2048, 0)), batch((1024, 0))

    def exchange(*batches: tuple[np.ndarray, np.ndarray]) -> float:
        with_link, without = (step_cost(p, engines=2, link=one, host=NO_HOST) for one in (link, free))
        return with_link(list(batches)) - without(list(batches))

    part = 2 * p.hidden * 1536
    assert exchange(large, small) == pytest.approx(
        p.layers * float(link.all_gather_s(part) + link.reduce_scatter_s(part))
    )


def test_collectives_are_read_between_the_sizes_measured_and_go_on_behind_them() -> None:
    link = Link((100.0, 200.0, 400.0), (10.0, 20.0, 30.0), (1.0, 1.0, 2.0), (4.0, 6.0, 6.0))
    assert link.all_reduce_s(150.0) == pytest.approx(15e-6)
    assert link.all_reduce_s(10.0) == pytest.approx(10e-6)
    assert link.all_reduce_s(np.array([400.0, 600.0])) == pytest.approx([30e-6, 40e-6])
    assert link.all_gather_s(300.0) == pytest.approx(1.5e-6)
    assert link.reduce_scatter_s(800.0) == pytest.approx(6e-6)


# ---- CUDA graphs -----------------------------------------------------------------------------------------------------


def test_graphs_are_captured_as_vllm_does() -> None:
    sizes = graph_sizes(VllmSettings(max_num_seqs=256))  # what vLLM 0.19 wrote of itself for max_num_seqs 256
    assert sizes == (1, 2, 4, *range(8, 257, 8), *range(272, 513, 16))
    assert graph_sizes(VllmSettings(max_num_seqs=128))[-1] == 256
    assert graph_sizes(VllmSettings(enforce_eager=True)) == ()
    assert graph_sizes(VllmSettings(cudagraph_capture_sizes=(1, 8))) == (1, 8)
    assert [graph_rows(n, sizes) for n in (1, 3, 8, 37, 250, 257, 512, 513)] == [1, 4, 8, 40, 256, 272, 512, 513]
    assert graph_rows(3, ()) == 3


def test_a_step_computes_the_rows_of_its_graph_with_its_own_attention_and_head() -> None:
    p = load_profile("rtx4090/llama-3.1-8b")
    assert isinstance(p, ComposedProfile)
    eager, graphs = step_cost(p, host=NO_HOST), step_cost(p, host=NO_HOST, graphs=(1, 2, 4, 8, 16, 24))
    decodes = batch(*[(1, 1000)] * 17)
    assert eager([decodes]) == pytest.approx(p.step_s(*decodes))
    assert graphs([decodes]) == pytest.approx(p.step_s(*decodes) + p.dense(24) - p.dense(17))
    larger = batch(*[(1, 1000)] * 30)
    assert graphs([larger]) == pytest.approx(p.step_s(*larger))


def test_factors_act_on_the_parts_of_a_step() -> None:
    p = load_profile("rtx4090/llama-3.1-8b")
    assert isinstance(p, ComposedProfile)
    mixed = batch((300, 0), (1, 500), (1, 700))
    as_measured, host = step_cost(p)([mixed]), Host(0.001, 1.02)
    assert step_cost(p, factors=Factors(attention=2.0))([mixed]) - as_measured == pytest.approx(
        1.02 * p.attention_s(*mixed, 302)
    )
    assert step_cost(p, factors=Factors(dense=2.0, attention=2.0), host=NO_HOST)([mixed]) == pytest.approx(
        2 * p.step_s(*mixed)
    )
    assert step_cost(p, factors=Factors(host=0.0), host=host)([mixed]) == pytest.approx(p.step_s(*mixed))
    assert step_cost(p, factors=Factors(beyond=2.0))([mixed]) == pytest.approx(as_measured)
    far = batch((1, 500), (1, 20_000))
    assert step_cost(p, factors=Factors(beyond=2.0))([far]) == pytest.approx(2 * p.step_s(*far))


def test_a_model_that_devices_share_is_looked_up_as_such() -> None:
    settings = VllmSettings(tensor_parallel_size=2)
    assert profile_for("rtxpro6000/qwen3-32b", settings).name == "rtxpro6000-tp2/qwen3-32b"
    assert profile_for("rtxpro6000-tp2/qwen3-32b", settings).name == "rtxpro6000-tp2/qwen3-32b"
    with pytest.raises(ConfigError, match="h100-tp2"):
        profile_for("h100/llama-3.1-8b", settings)


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
