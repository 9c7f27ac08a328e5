"""The parts of LENS one by one: deadlines, step limit, prefill rate, order, guard, chunks, victims."""

from __future__ import annotations

import itertools
import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from nexusengine.core.admission import unattainable
from nexusengine.perf.features import StepFeatures
from nexusengine.scheduler.attainable import attainable
from nexusengine.scheduler.lens.deadlines import FALLBACK, Deadlines
from nexusengine.scheduler.lens.estimators import OutputLengthFloor, SlotReleaseRate
from nexusengine.scheduler.lens.fill import largest_chunk
from nexusengine.scheduler.lens.length_guard import LengthGuard
from nexusengine.scheduler.lens.preemption import victims
from nexusengine.scheduler.lens.prefill_rate import PrefillRate, marginal_costs, mixing_cost_s, prefill_rate
from nexusengine.scheduler.lens.select import by_priority
from nexusengine.scheduler.lens.step_limit import CAP_STEPS, StepLimit, step_limit
from nexusengine.scheduler.moore_hodgson import defer
from nexusengine.scheduler.view import EngineView
from nexusengine.types import SLO
from tests.support.lens_views import NAN, Bench, Straight

CAP_S = 0.12


def deadlines_of(view: EngineView) -> Deadlines:
    deadlines = Deadlines(len(view.columns.known_tokens))
    deadlines.update(view, view.running)
    deadlines.update(view, view.waiting)
    return deadlines


def limit_of(
    bench: Bench,
    now: float,
    *,
    decode_s: float = 0.01,
    single_s: float = 0.006,
    cap_s: float = CAP_S,
    floor_tokens: int = 0,
) -> StepLimit:
    view = bench.view()
    return step_limit(
        view,
        deadlines_of(view),
        view.running,
        now,
        decode_s=decode_s,
        single_s=single_s,
        cap_s=cap_s,
        floor_tokens=floor_tokens,
    )


# ---- deadlines ----------------------------------------------------------------------------------------------------


def test_the_first_token_is_due_a_ttft_after_arrival() -> None:
    bench = Bench()
    slot = bench.wait(100, arrival_s=3.0, ttft_s=0.5)
    deadlines = deadlines_of(bench.view())
    assert deadlines.first_due_s[slot] == deadlines.prefill_due_s[slot] == 3.5
    assert deadlines.tpot_s[slot] == 0.05


def test_a_request_without_an_slo_has_no_deadline_but_a_turn() -> None:
    bench = Bench()
    slot = bench.wait(1000, arrival_s=3.0, ttft_s=NAN, tpot_s=NAN)
    resumed = bench.wait(1000, arrival_s=3.0, ttft_s=NAN, tpot_s=NAN)
    bench.c.generated_tokens[resumed], bench.c.first_token_s[resumed] = 40, 4.0
    deadlines = deadlines_of(bench.view())
    for instants in (deadlines.first_due_s, deadlines.prefill_due_s, deadlines.tpot_s):
        assert instants[[slot, resumed]].tolist() == [math.inf, math.inf]
    assert deadlines.attainable[slot]
    assert deadlines.turn_s[slot] == 3.0 + 30.0


def test_a_promise_the_device_cannot_keep_even_alone_is_marked_and_served_as_none() -> None:
    bench = Bench()
    tight_ttft = bench.wait(1000, ttft_s=0.001)
    tight_tpot = bench.wait(1000, tpot_s=0.001)
    fine = bench.wait(1000)
    deadlines = deadlines_of(bench.view())
    assert deadlines.attainable[[tight_ttft, tight_tpot, fine]].tolist() == [False, False, True]
    assert deadlines.first_due_s[tight_ttft] > 30.0
    assert deadlines.tpot_s[tight_tpot] == FALLBACK.tpot_s


def test_attainable_asks_the_model_for_the_whole_prompt_and_for_one_decode() -> None:
    prompts = np.array([1000.0, 1000.0, 1000.0])
    met = attainable(Straight(), 8192, prompts, np.array([0.0294, 0.0296, 1.0]), np.array([1.0, 1.0, 0.005]))
    assert met.tolist() == [False, True, False]  # 5 + 4 + 20 ms and 0.5 ms of attention; a decode takes 5.06 ms


def test_a_prompt_longer_than_a_full_step_takes_several_for_whoever_asks() -> None:
    """5 + 4 ms and 20 us a token each, and 1 ns a token pair: 0.34 + 0.13 s in two steps, 0.32 + 0.13 s in one."""
    bench = Bench()
    two_steps_s = 2 * 0.009 + 16_000 * 20e-6 + 0.5e-9 * 16_000**2
    for ttft_s, met in ((two_steps_s - 0.005, False), (two_steps_s + 0.001, True)):
        slot = bench.wait(16_000, ttft_s=ttft_s)
        view = bench.view()
        assert deadlines_of(view).attainable[slot] == met
        assert unattainable(view, 16_000, SLO(ttft_s, 0.05)) != met


def test_a_resumed_request_is_due_with_its_next_token_and_some_grace() -> None:
    bench = Bench()
    slot = bench.wait(100, arrival_s=0.0)
    bench.c.generated_tokens[slot], bench.c.first_token_s[slot] = 40, 1.0
    deadlines = deadlines_of(bench.view())
    assert deadlines.prefill_due_s[slot] == pytest.approx(1.0 + 40 * 0.05 + 0.25 * 0.05 * (40 + 64))


def test_a_slot_that_is_used_again_gets_new_deadlines() -> None:
    bench = Bench()
    slot = bench.wait(100, arrival_s=0.0)
    view = bench.view()
    deadlines = deadlines_of(view)
    bench.c.arrival_s[slot] = 7.0
    deadlines.update(view, view.waiting)
    assert deadlines.first_due_s[slot] == 17.0


# ---- step limit ---------------------------------------------------------------------------------------------------


def test_a_request_that_is_on_time_allows_what_is_left_until_its_token_is_due() -> None:
    bench = Bench()
    slot = bench.decode(first_s=1.0, generated=3)
    limit = limit_of(bench, now=1.1)  # token 3 is due at 1.15
    assert limit.limit_s == pytest.approx(0.05)
    assert (limit.slot, limit.tightest_tpot_s) == (slot, 0.05)


def test_a_request_that_is_early_gives_its_whole_lead() -> None:
    bench = Bench()
    bench.decode(first_s=1.0, generated=3)
    assert limit_of(bench, now=1.06).limit_s == pytest.approx(0.09)


def test_a_request_that_is_late_asks_for_shorter_steps_but_never_freezes_prefill() -> None:
    bench = Bench()
    bench.decode(first_s=1.0, generated=3)
    assert limit_of(bench, now=1.11).limit_s == pytest.approx(0.04)
    assert limit_of(bench, now=1.16).limit_s == pytest.approx(0.7 * 0.05)


def test_the_tightest_request_sets_the_limit() -> None:
    bench = Bench()
    bench.decode(first_s=1.0, generated=1, tpot_s=0.1)
    tight = bench.decode(first_s=1.0, generated=2, tpot_s=0.04)
    limit = limit_of(bench, now=1.01)
    assert limit.slot == tight
    assert limit.limit_s == pytest.approx(0.07)


def test_no_step_is_longer_than_the_cap_even_if_nobody_minds() -> None:
    bench = Bench()
    assert limit_of(bench, now=1.0) == StepLimit(CAP_S, -1, pytest.approx(np.zeros(0)), float("inf"))
    bench.decode(first_s=1.0, generated=100)
    assert (limit_of(bench, now=1.0).limit_s, limit_of(bench, now=1.0).slot) == (CAP_S, -1)
    assert limit_of(bench, now=1.0, single_s=0.2).limit_s == pytest.approx(CAP_STEPS * 0.2)


def test_lost_requests_constrain_nobody() -> None:
    bench = Bench()
    bench.decode(first_s=11.0, generated=2, ttft_s=10.0)  # its first token was late
    bench.decode(first_s=1.0, generated=2, arrival_s=0.0)  # ten seconds behind
    fine = bench.decode(first_s=11.0, generated=2, arrival_s=5.0)
    limit = limit_of(bench, now=11.06)
    assert limit.slo_missed.tolist() == [True, True, False]
    assert limit.slot == fine


def test_a_request_that_is_behind_but_can_make_it_good_is_not_lost() -> None:
    bench = Bench()
    bench.decode(first_s=1.0, generated=100)
    assert not limit_of(bench, now=9.0).slo_missed[0]  # 3 s behind, 200 tokens at 40 ms each make 8 s good
    assert limit_of(bench, now=15.0).slo_missed[0]
    assert limit_of(bench, now=7.0, decode_s=0.06).slo_missed[0]  # decodes alone are too slow: nothing is made good


def test_a_last_prompt_token_has_no_pace_to_keep() -> None:
    bench = Bench()
    bench.begun(100, 99)
    limit = limit_of(bench, now=1.0)
    assert (limit.slot, limit.limit_s, limit.tightest_tpot_s) == (-1, CAP_S, float("inf"))


def test_requests_without_an_slo_bear_any_step_and_are_never_lost() -> None:
    bench = Bench()
    bench.decode(first_s=1.0, generated=2, ttft_s=NAN, tpot_s=NAN)
    assert limit_of(bench, now=900.0) == StepLimit(CAP_S, -1, pytest.approx(np.zeros(1)), math.inf)
    promised = bench.decode(first_s=1.0, generated=2)
    limit = limit_of(bench, now=1.05)
    assert (limit.slot, limit.limit_s, limit.slo_missed.tolist()) == (promised, pytest.approx(0.05), [False, False])


def test_a_tpot_that_is_not_possible_constrains_nobody() -> None:
    bench = Bench()
    bench.decode(first_s=1.0, generated=2)
    assert limit_of(bench, now=1.0, decode_s=0.06, single_s=0.055).slot == -1


def test_what_an_early_decode_is_sure_to_gain_can_be_spent_once() -> None:
    bench = Bench()
    bench.decode(first_s=1.0, generated=2)  # due at 1.1
    bench.decode(first_s=-10.0, generated=2)  # lost: bears anything

    def burst_s(floor_tokens: int, decode_s: float = 0.03) -> float:
        return limit_of(bench, 1.02, decode_s=decode_s, cap_s=1.0, floor_tokens=floor_tokens).burst_s

    assert burst_s(12) == pytest.approx(0.08 + 10 * 0.02)
    assert burst_s(2) == pytest.approx(0.08)  # it has them already
    assert burst_s(12, decode_s=0.06) == pytest.approx(0.08)  # decodes are too slow to gain anything
    assert burst_s(0) == pytest.approx(0.08)  # nothing is known
    assert burst_s(1000) == 1.0  # the cap


# ---- output-length floor ------------------------------------------------------------------------------------------


def grown_to(lengths: list[int], tokens: int) -> OutputLengthFloor:
    """Answers of these lengths one after another in the same slot."""
    survival, slot = OutputLengthFloor(tokens), np.array([3], np.int32)
    for length in lengths:
        for generated in range(1, length + 1):
            survival.observe(slot, np.array([generated], np.int32), 8)
    return survival


def test_answers_are_sure_to_reach_what_almost_all_have_reached() -> None:
    assert grown_to([20] * 9, 20).floor_tokens() == 0  # too few to tell
    assert grown_to([20] * 11, 20).floor_tokens() == 20
    assert grown_to(([20] * 19 + [19]) * 5, 20).floor_tokens() == 20
    assert grown_to(([20] * 9 + [19]) * 10, 20).floor_tokens() == 0


def test_survival_forgets_answers_of_long_ago() -> None:
    assert grown_to([3] * 200 + [50] * 200, 20).floor_tokens() == 0
    assert grown_to([3] * 200 + [50] * 600, 20).floor_tokens() == 20


def test_tokens_that_pass_between_two_plans_are_counted() -> None:
    survival, slots = OutputLengthFloor(20), np.array([0, 5], np.int32)
    for _ in range(6):
        for generated in (2, 9, 27, 31):
            survival.observe(slots, np.array([generated, generated], np.int32), 8)
    assert survival.floor_tokens() == 20


# ---- prefill rate -------------------------------------------------------------------------------------------------


def rate(limit_s: float, *, decode_s: float = 0.02, extra_s: float = 0.01, coalescing: float = 8) -> PrefillRate:
    limit = StepLimit(limit_s, 0, np.zeros(1, np.bool_), tightest_tpot_s=0.05)
    kept = 0.98  # of every limit, which `factor` gives back here
    return prefill_rate(limit, decode_s, extra_s, factor=kept, coalescing=coalescing, cap_s=CAP_S)


def test_costs_are_what_the_model_charges_at_the_margin() -> None:
    base = StepFeatures(10, 10, 0, 0.0, 10_000)
    costs = marginal_costs(Straight(), base, 512)
    assert costs.single_s == pytest.approx(0.005 + 20e-6 + 1024 * 40e-9)
    assert costs.token_s == pytest.approx(20e-6)
    assert costs.pair_s == pytest.approx(1e-9)
    assert costs.kv_token_s == pytest.approx(40e-9)
    work_s = costs.work_s(np.array([0, 1000], np.int32), np.array([100, 100], np.int32))
    assert work_s == pytest.approx([2e-3 + 5e-6, 2e-3 + 105e-6])
    decode_s = Straight().predict(base).mean_s
    assert mixing_cost_s(Straight(extra_s=0.004), base, decode_s) == pytest.approx(0.004 + 16 * 20e-6)


def test_without_coalescing_a_step_gives_prompts_what_decodes_and_mixing_leave() -> None:
    p = rate(0.05, coalescing=0)
    assert (p.step_s, p.prompts_s) == (0.05, pytest.approx(0.02))
    assert p.slowdown == pytest.approx(2.5)
    assert not p.coalesces


def test_prefills_are_coalesced_where_mixed_steps_are_dear() -> None:
    p = rate(0.05)
    assert p.coalesces
    assert p.target_s == pytest.approx(0.10)
    # 8/3 decode-only steps leave 30 ms each; cycles of 8/3 * 50 ms have 70 ms for prompts
    assert p.slowdown == pytest.approx(8 / 3 * 0.05 / 0.07)
    assert p.first_s == pytest.approx(5 / 3 * 0.02 + 0.10)


def test_nothing_is_coalesced_where_mixing_is_cheap_or_the_target_is_reached() -> None:
    assert not rate(0.05, extra_s=0.001).coalesces
    assert not rate(0.095).coalesces
    assert not rate(0.05, decode_s=0.049).coalesces


@pytest.mark.parametrize("extra_s", [0.03, 0.1, 0.3])
def test_prompts_have_a_little_time_however_dear_mixed_steps_are(extra_s: float) -> None:
    p = rate(0.05, extra_s=extra_s)
    assert min(p.prompts_s, p.first_prompts_s) > 0
    assert 1 < p.slowdown <= p.eager_slowdown


def test_work_until_and_time_for_are_inverses_behind_the_first_step() -> None:
    p = rate(0.05)
    work_s = np.array([0.08, 0.2, 1.0])
    assert p.work_until(p.time_for(work_s)) == pytest.approx(work_s)


def test_work_until_a_near_deadline_is_that_of_a_step_right_now() -> None:
    p = rate(0.05)
    assert p.work_until(np.array([0.04, 0.05, 0.06])) == pytest.approx([0.01, 0.02, 0.02 + 0.01 / 2.5])


# ---- order --------------------------------------------------------------------------------------------------------

jobs = st.lists(st.tuples(st.integers(1, 20), st.integers(0, 60)), max_size=9)


@given(jobs)
def test_no_choice_keeps_more_in_time_than_defer_does(jobs: list[tuple[int, int]]) -> None:
    jobs = sorted(jobs, key=lambda job: job[1])
    work, allowed = np.array([j[0] for j in jobs], float), np.array([j[1] for j in jobs], float)
    kept = ~defer(work, allowed)
    assert (np.cumsum(work[kept]) <= allowed[kept]).all()
    best = 0
    for size in range(len(jobs), -1, -1):
        if any(feasible(choice) for choice in itertools.combinations(jobs, size)):
            best = size
            break
    assert kept.sum() == best


def feasible(jobs: tuple[tuple[int, int], ...]) -> bool:
    done = 0
    for work, allowed in jobs:
        done += work
        if done > allowed:
            return False
    return True


def test_the_largest_of_the_lowest_rank_is_deferred() -> None:
    work, allowed = np.array([5.0, 4.0, 1.0]), np.array([10.0, 10.0, 6.0])
    assert defer(work, allowed).tolist() == [True, False, False]
    assert defer(work, allowed, [1, 0, 0]).tolist() == [False, True, False]


@given(jobs, st.lists(st.tuples(st.booleans(), st.integers(0, 4)), min_size=8, max_size=8))
def test_those_on_time_have_both_the_time_and_a_slot(
    jobs: list[tuple[int, int]], seats: list[tuple[bool, int]]
) -> None:
    jobs = sorted(jobs, key=lambda job: job[1])
    work, allowed = np.array([j[0] for j in jobs], float), np.array([j[1] for j in jobs], float)
    newcomers = np.resize([s[0] for s in seats], len(jobs))
    free = np.sort(np.resize([float(s[1]) for s in seats], len(jobs)))
    kept = ~defer(work, allowed, None, newcomers, free)
    assert (np.cumsum(work[kept]) <= allowed[kept]).all()
    assert (np.cumsum(newcomers[kept]) <= free[kept])[newcomers[kept]].all()


def test_where_slots_are_short_the_largest_waiting_request_is_deferred() -> None:
    work, allowed = np.array([9.0, 5.0, 4.0, 1.0]), np.full(4, 100.0)
    newcomers, seats = np.array([False, True, True, True]), np.array([2.0, 2.0, 2.0, 2.0])
    assert defer(work, allowed, None, newcomers, seats).tolist() == [False, True, False, False]


# ---- slot release rate --------------------------------------------------------------------------------------------


def test_slots_come_free_as_often_as_running_requests_have_ended() -> None:
    releases = SlotReleaseRate()
    running = 100
    for step in range(200):  # one in a hundred ends every 10 ms: a slot is held for a second
        releases.observe(running - 1 if step else 0, 0.01 * step)
        releases.planned(running)
    assert releases.slot_wait_s(200) == pytest.approx(1.0 / 200)
    assert releases.slots_within(np.array([-1.0, 0.0, 0.5]), 3, 200) == pytest.approx([3.0, 3.0, 103.0])


def test_while_few_have_ended_slots_are_taken_to_be_no_obstacle() -> None:
    releases = SlotReleaseRate()
    releases.observe(0, 0.0)
    releases.planned(4)
    releases.observe(1, 0.1)
    assert releases.slot_wait_s(8) == 0.0
    assert releases.slots_within(np.array([0.0]), 0, 8).tolist() == [np.inf]


def test_priority_counts_within_a_class_only() -> None:
    order = np.array([0, 1, 2, 3], np.int32)
    tpot_s, priority = np.array([0.05, 0.5, 0.05, 0.5]), np.array([0, 0, 5, 9], np.int32)
    assert by_priority(order, tpot_s, priority).tolist() == [2, 3, 0, 1]
    assert by_priority(order, tpot_s, np.zeros(4, np.int32)).tolist() == [0, 1, 2, 3]


# ---- guard --------------------------------------------------------------------------------------------------------


def test_the_guard_protects_those_of_the_longest_tenth_that_its_goal_counts_on() -> None:
    guard = LengthGuard(0.75)
    lengths = np.random.default_rng(1).permutation(np.arange(1, 1001)).tolist() * 3
    for tokens in lengths:
        guard.decided(tokens, False)
    assert guard.long_tokens == (pytest.approx(900, rel=0.1), pytest.approx(975, rel=0.1))
    low, high = guard.long_tokens
    lengths_now = np.array([500, low + 1, high - 1, high + 1], np.int32)
    assert guard.protected(lengths_now).tolist() == [False, True, True, False]


def test_the_guard_protects_the_longest_when_they_are_lost_and_few_are() -> None:
    guard = LengthGuard(0.75)
    for i in range(400):
        guard.decided(i % 100 + 1, lost=i % 100 >= 96)
    assert guard.active
    assert guard.lost == pytest.approx(0.04, abs=0.02)


def test_the_guard_lets_go_when_too_many_are_lost_or_none_of_the_longest_is() -> None:
    many, short = LengthGuard(0.75), LengthGuard(0.75)
    for i in range(400):
        many.decided(i % 100 + 1, lost=i % 100 >= 70)
        short.decided(i % 100 + 1, lost=i % 100 < 5)
    assert not many.active
    assert not short.active


# ---- chunks -------------------------------------------------------------------------------------------------------


@given(
    limit_ms=st.floats(1, 200),
    rows=st.integers(0, 200),
    context=st.integers(0, 10_000),
    most=st.integers(1, 8192),
)
def test_a_chunk_fits_its_limit_and_leaves_little_of_it(limit_ms: float, rows: int, context: int, most: int) -> None:
    model, base, limit_s = Straight(), StepFeatures(rows, rows, 0, 0.0, rows * 500), limit_ms / 1000
    count = largest_chunk(model, limit_s, base, context, most)

    def step_s(q: int) -> float:
        pairs = q * (context + 0.5 * q)
        return 0.005 + 20e-6 * (rows + q) + 40e-9 * rows * 500 + (0.004 + 1e-9 * pairs if q > 1 else 0.0)

    assert 0 <= count <= most
    if count > 1:
        assert step_s(count) <= limit_s + 1e-9
    if 1 < count < most:
        assert step_s(count + 1) > limit_s or step_s(count) >= 0.979 * limit_s


# ---- victims ------------------------------------------------------------------------------------------------------


def test_lost_ones_give_way_first_then_the_loosest_then_prompts_then_the_newest() -> None:
    bench = Bench()
    old = bench.decode(first_s=0.5, arrival_s=0.0)
    new = bench.decode(first_s=0.5, arrival_s=0.2)
    prompt = bench.begun(100, 50, arrival_s=0.1)
    loose = bench.decode(first_s=0.5, arrival_s=0.0, tpot_s=0.5)
    lost = bench.decode(first_s=2.0, arrival_s=0.0, ttft_s=1.0)
    relegated = bench.begun(100, 50, arrival_s=0.3)
    bench.c.relegated[relegated] = True
    view = bench.view()
    assert list(victims(view, deadlines_of(view), 2.5)) == [relegated, lost, loose, prompt, new, old]
