"""Replays of measured vLLM runs: the pipeline of steps, engines that step together, CUDA graphs."""

from typing import Any

import numpy as np
import pytest

from nexusengine.errors import ConfigError
from nexusengine.profiles.composed import ComposedProfile
from nexusengine.profiles.links import LINKS, Link
from nexusengine.profiles.registry import load_profile
from nexusengine.sim.replay import Balancer, profile_for, replay
from nexusengine.sim.vllm_run import (
    Measured,
    Sent,
    VllmSettings,
    graph_sizes,
)
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
    assert profile_for("rtxpro6000/qwen3-32b", settings).identity.name == "rtxpro6000-tp2/qwen3-32b"
    assert profile_for("rtxpro6000-tp2/qwen3-32b", settings).identity.name == "rtxpro6000-tp2/qwen3-32b"
    with pytest.raises(ConfigError, match="h100-tp2"):
        profile_for("h100/llama-3.1-8b", settings)
