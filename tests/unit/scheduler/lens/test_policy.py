"""LENS as a whole: what a step holds, who waits and why, who is relegated, restored, refused."""

from __future__ import annotations

import pytest

from nexusengine.errors import ConfigError
from nexusengine.scheduler.lens.policy import Lens
from nexusengine.scheduler.lens.step_cap import StepCap
from nexusengine.scheduler.plan import Reason
from nexusengine.scheduler.registry import POLICIES, make_policy
from tests.support.lens_plans import computed, plan
from tests.support.lens_views import NAN, Bench, Straight

# ---- the step -----------------------------------------------------------------------------------------------------


def test_decodes_run_and_the_prompt_gets_what_the_tightest_of_them_leaves() -> None:
    bench = Bench()
    decode = bench.decode(first_s=1.0, generated=200)
    prompt = bench.wait(5000, arrival_s=10.9)
    p = plan(bench.view(), now=10.95)  # token 200 is due at 11.0: 50 ms
    assert computed(p)[decode] == 1
    assert 1500 < computed(p)[prompt] < 2100  # 50 ms less 2 %, less 9 ms, at 20 us a token and its attention
    assert p.predicted_s <= 0.049
    assert p.predicted_s > 0.95 * 0.049
    assert p.reasons[decode] == Reason.DECODE
    assert p.reasons[prompt] == Reason.ADMITTED
    assert p.notes["limit_slot"] == decode


def test_where_a_young_request_sets_the_limit_the_step_is_unlikely_to_take_longer() -> None:
    bench = Bench()
    bench.decode(first_s=1.0, generated=2)
    bench.wait(5000)
    p = plan(bench.view(), now=1.05)  # token 2 is due at 1.10
    assert p.notes["limit_ms"] == pytest.approx(50.0)
    assert 0.044 < p.upper_s <= 0.049


@pytest.mark.parametrize(("lived", "relegated", "limit_ms"), [(20, False, 135.12), (3, False, 50), (20, True, 50)])
def test_a_young_request_spends_what_almost_all_have_lived_to_gain_while_nobody_is_relegated(
    lived: int, relegated: bool, limit_ms: float
) -> None:
    bench = Bench()
    for _ in range(20):
        bench.decode(first_s=1.0, generated=lived, tpot_s=1.0)
    bench.decode(first_s=1.0, generated=1)
    bench.wait(5000)
    if relegated:
        bench.wait(100, ttft_s=0.5, relegated=True)
    p = plan(bench.view(), now=1.0)  # the young one's next token is due at 1.05; 30 times what mixing costs is 130 ms
    assert p.notes["limit_ms"] == pytest.approx(limit_ms)


def test_upper_bounds_are_planned_with_if_asked_for() -> None:
    bench = Bench()
    bench.decode(first_s=1.0, generated=2)
    bench.wait(5000)
    assert plan(bench.view(), now=1.05, quantile=1).upper_s <= 0.049


def test_prompts_are_served_by_deadline() -> None:
    bench = Bench()
    bench.decode(first_s=1.0, generated=2)
    late = bench.wait(1500, ttft_s=9.0)
    soon = bench.wait(1500, ttft_s=3.0)
    partial = bench.partial(2000, 500, ttft_s=5.0)
    p = plan(bench.view(), now=1.05)
    assert computed(p)[soon] == 1500
    assert partial in computed(p)
    assert late not in computed(p)
    assert p.reasons[late] == Reason.WAIT_TIME


def test_where_not_all_can_be_in_time_the_largest_is_put_off() -> None:
    bench = Bench()
    large = bench.wait(4000, ttft_s=0.12)
    small = [bench.wait(1000, ttft_s=0.13) for _ in range(4)]
    p = plan(bench.view())
    assert set(computed(p)) >= set(small)
    assert p.reasons[large] in (Reason.DEFERRED, Reason.WAIT_TIME, Reason.ADMITTED)
    assert p.notes["deferred"] == 1.0


def test_who_cannot_be_in_time_is_relegated_and_gets_what_is_left() -> None:
    bench = Bench()
    doomed = bench.wait(4000, ttft_s=0.05)  # alone it would take 97 ms
    fine = bench.wait(100, ttft_s=1.0)
    bench.c.ttft_s[doomed] = 0.2
    p = plan(bench.view(), now=0.15)
    assert p.relegate == (doomed,)
    assert computed(p)[fine] == 100
    assert p.reasons[doomed] == Reason.BACKFILL


def test_a_relegated_request_waits_behind_those_who_can_be_in_time() -> None:
    bench = Bench()
    bench.decode(first_s=1.0, generated=2)
    old = bench.wait(1500, ttft_s=0.5, relegated=True)
    fine = bench.wait(3000, arrival_s=1.0)
    p = plan(bench.view(), now=1.05)
    assert fine in computed(p)
    assert old not in computed(p)
    assert p.reasons[old] == Reason.RELEGATED


def test_no_newcomer_starts_that_would_bring_decodes_too_near_to_their_tpot() -> None:
    bench = Bench()
    bench.decode(first_s=1.0, generated=100, prompt=900_000)  # its KV alone makes a step of 41 ms
    heavy = bench.wait(200_000)
    light = bench.wait(100)
    p = plan(bench.view(free=100_000), now=3.0)
    assert p.reasons[heavy] == Reason.WAIT_TPOT
    assert light in computed(p)


def test_who_has_lost_its_promise_may_be_slowed_down() -> None:
    bench = Bench()
    bench.decode(first_s=5.0, generated=2, ttft_s=1.0)
    prompt = bench.wait(3000, arrival_s=4.0)
    p = plan(bench.view(), now=5.06)
    assert computed(p)[prompt] == 3000
    assert p.notes["limit_slot"] == -1


def test_a_step_is_bounded_for_the_sake_of_those_who_are_yet_to_come() -> None:
    policy = Lens()
    for now in range(20):  # each with 0.2 s of slack, of which half may be spent on the step under way
        bench = Bench()
        bench.wait(1000, arrival_s=now, ttft_s=0.2 + 0.0309)
        plan(bench.view(arrivals=now), float(now), policy)
    bench.wait(8000, arrival_s=19.0)
    p = plan(bench.view(arrivals=20), 19.0, policy)
    assert 0.095 < p.predicted_s <= 0.11


def test_a_step_without_slos_is_as_large_as_those_of_fcfs() -> None:
    for largest in (2048, 8192):
        bench = Bench()
        bench.decode(first_s=0.0, generated=3, ttft_s=NAN, tpot_s=NAN)
        for i in range(12):
            bench.wait(1000, arrival_s=0.1 * i, ttft_s=NAN, tpot_s=NAN)
        view = bench.view(batch=largest)
        p, fcfs = Lens().plan(view, 5.0), make_policy("fcfs").plan(view, 5.0)
        assert computed(p) == computed(fcfs)
        assert p.counts.sum() == largest


def test_without_an_slo_nobody_overtakes_one_that_lacks_blocks() -> None:
    bench = Bench()
    bench.decode(first_s=0.0, generated=3, ttft_s=NAN, tpot_s=NAN)
    large = bench.wait(1000, ttft_s=NAN, tpot_s=NAN)
    small = bench.wait(20, ttft_s=NAN, tpot_s=NAN)
    p = plan(bench.view(free=40))
    assert computed(p) == {0: 1}
    assert p.reasons[[large, small]].tolist() == [Reason.WAIT_BLOCKS, Reason.WAIT_BLOCKS]


def test_a_prompt_that_fits_is_not_made_late_by_those_behind_it() -> None:
    bench = Bench()
    soon = bench.wait(1000, ttft_s=0.05)  # 30 ms alone
    other = bench.wait(4000, ttft_s=10.0)
    p = plan(bench.view())
    assert computed(p)[soon] == 1000
    assert 0 < computed(p)[other] < 1000
    assert p.predicted_s <= 0.05


def test_no_crumbs() -> None:
    bench = Bench()
    bench.decode(first_s=1.0, generated=200, tpot_s=0.05)
    first = bench.wait(1905, arrival_s=10.0, ttft_s=5.0)
    second = bench.wait(500, arrival_s=10.0, ttft_s=9.0)
    p = plan(bench.view(), now=10.95)
    assert computed(p)[first] == 1905
    assert second not in computed(p)


def test_no_step_is_much_larger_than_any_seen_before() -> None:
    bench = Bench()
    bench.wait(8000)
    p = Lens().plan(bench.view(), 0.0)
    assert p.counts.sum() == 768


def test_a_step_is_never_empty_even_if_the_cap_forbids_everything(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(StepCap, "prompts_s", lambda *args: 0.001)
    bench = Bench(model=Straight(extra_s=100.0))
    slot = bench.wait(500, ttft_s=NAN, tpot_s=NAN)
    assert computed(plan(bench.view())) == {slot: 16}


# ---- saving up ----------------------------------------------------------------------------------------------------


def test_time_is_saved_up_where_mixed_steps_are_dear_and_nobody_is_pressed() -> None:
    bench = Bench(model=Straight(extra_s=0.02))
    bench.decode(first_s=1.0, generated=2)
    prompt = bench.wait(6000, ttft_s=60.0)
    p = plan(bench.view(), now=1.05)
    assert p.reasons[prompt] == Reason.WAIT_COALESCE
    assert p.counts.tolist() == [1]
    bench.c.generated_tokens[0] = 6  # four tokens later, in little more time
    assert prompt in computed(plan(bench.view(), now=1.06))


def test_nobody_waits_for_savings_who_would_be_late() -> None:
    bench = Bench(model=Straight(extra_s=0.02))
    bench.decode(first_s=1.0, generated=2)
    pressed = bench.wait(500, ttft_s=1.12)
    bench.wait(6000, ttft_s=60.0)
    assert pressed in computed(plan(bench.view(), now=1.05))


def test_nothing_is_saved_up_where_everything_fits_at_once() -> None:
    bench = Bench(model=Straight(extra_s=0.02))
    bench.decode(first_s=1.0, generated=2)
    prompt = bench.wait(300, ttft_s=60.0)
    assert computed(plan(bench.view(), now=1.05))[prompt] == 300


# ---- priority, promises --------------------------------------------------------------------------------------------


def test_priority_goes_first_within_its_class() -> None:
    bench = Bench()
    bench.decode(first_s=1.0, generated=2)
    first = bench.wait(1500, ttft_s=8.0)
    preferred = bench.wait(1500, ttft_s=9.0, priority=1)
    p = plan(bench.view(), now=1.05)
    assert computed(p)[preferred] == 1500
    assert computed(p).get(first, 0) < 500


def test_requests_without_a_promise_wait_behind_deadlines_and_are_served() -> None:
    bench = Bench()
    none = bench.wait(100, ttft_s=NAN, tpot_s=NAN)
    fine = bench.wait(100)
    p = plan(bench.view())
    assert computed(p) == {fine: 100, none: 100}
    assert p.slots.tolist() == [fine, none]
    assert p.relegate == ()


def test_requests_without_a_promise_are_served_as_they_came_and_never_late_whatever_they_wait_for() -> None:
    bench = Bench(slots=22)  # two seats, twenty places in the queue
    bench.decode(first_s=0.9, generated=2, ttft_s=NAN, tpot_s=NAN)
    first = bench.partial(200_000, 100, ttft_s=NAN, tpot_s=NAN)
    for i in range(20):
        bench.wait(5000 - i, arrival_s=0.01 * i, ttft_s=NAN, tpot_s=NAN)
    view = bench.view(seats=2)
    policy = Lens()
    for now in (1.0, 100.0, 10_000.0):
        p = plan(view, now, policy)
        assert (p.relegate, p.refuse) == ((), ())
        assert p.slots.tolist() == [0, first]
    bench = Bench()
    waiting = [bench.wait(500 - i, arrival_s=0.01 * i, ttft_s=NAN, tpot_s=NAN) for i in range(5)]
    assert plan(bench.view(), 10_000.0).slots.tolist() == waiting


def test_one_without_a_promise_is_not_put_off_for_others() -> None:
    """It would not help them: it comes behind all deadlines anyway."""
    bench = Bench()
    none = bench.wait(6000, ttft_s=NAN, tpot_s=NAN)
    bench.wait(4000, ttft_s=0.12)
    small = [bench.wait(1000, ttft_s=0.13) for _ in range(4)]
    p = plan(bench.view())
    assert p.notes["deferred"] == 1.0
    assert p.slots.tolist()[:4] == small
    assert p.reasons[none] != Reason.DEFERRED


def test_one_without_a_promise_gets_its_share_although_deadlines_keep_coming() -> None:
    """From 20 s past its turn, half a minute after it came."""
    policy = Lens(share=0.1)
    bench = Bench()
    bench.decode(first_s=29.9, generated=2, arrival_s=29.0)
    old = bench.partial(3000, 500, ttft_s=NAN, tpot_s=NAN)
    bench.wait(100_000, arrival_s=29.0, ttft_s=100.0)
    view = bench.view()

    def reasons(begin_s: float) -> list[int]:
        found = []
        for step in range(20):
            bench.c.first_token_s[0], bench.c.generated_tokens[0] = begin_s - 0.1, 2 + step
            p = plan(view, begin_s + 0.05 * step, policy)
            assert len(set(p.slots.tolist())) == len(p.slots)
            found.append(int(p.reasons[old]))
        return found

    assert Reason.AGED not in reasons(40.0)
    assert reasons(50.1).count(Reason.AGED) > 2


# ---- ablations, options, predictions ---------------------------------------------------------------------------------


def test_without_order_prompts_are_served_as_they_came_and_nobody_is_relegated() -> None:
    bench = Bench()
    doomed = bench.wait(500, ttft_s=0.1)
    fine = bench.wait(100, ttft_s=9.0)
    p = plan(bench.view(), now=5.0, order=0)
    assert p.relegate == ()
    assert p.slots.tolist() == [doomed, fine]


def test_without_a_step_limit_the_token_budget_counts() -> None:
    bench = Bench()
    bench.decode(first_s=1.0, generated=2)
    prompt = bench.wait(5000)
    assert computed(plan(bench.view(), now=1.05, limit=0, budget=300))[prompt] == 299


def test_options_are_checked() -> None:
    for spec, word in (("lens:sahre=1", "sahre"), ("lens:share=-1", "share"), ("paper-lens:per=0", "per")):
        with pytest.raises(ConfigError, match=word):
            make_policy(spec)
    assert {make_policy(name).name for name in POLICIES} == set(POLICIES)


def test_a_plan_says_by_when_prompts_are_to_be_done_where_their_slo_is_out_of_reach() -> None:
    bench = Bench()
    fine = bench.wait(1000)
    hopeless = bench.wait(1000, ttft_s=0.001)
    p = plan(bench.view(), now=0.0)
    assert p.due_s is not None
    c = bench.view().columns
    assert p.due_s[fine] == c.arrival_s[fine] + c.ttft_s[fine]
    assert p.due_s[hopeless] > 30.0, "as if it had been promised what the class batch is"
