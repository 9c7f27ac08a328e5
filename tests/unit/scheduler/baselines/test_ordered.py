"""The baselines: what makes each what it is."""

from __future__ import annotations

from nexusengine.scheduler.baselines.nexussched import PaperLens
from nexusengine.scheduler.baselines.ordered import EDF, SRPT, Sarathi
from nexusengine.scheduler.baselines.prefill_first import PrefillFirst
from nexusengine.scheduler.plan import Reason, SchedulerPolicy, StepPlan
from nexusengine.scheduler.validate import plan_problem
from nexusengine.scheduler.view import EngineView
from tests.support.lens_views import NAN, Bench


def plan(policy: SchedulerPolicy, view: EngineView, now: float = 0.0) -> StepPlan:
    result = policy.plan(view, now)
    assert plan_problem(result, view) is None
    return result


def computed(p: StepPlan) -> dict[int, int]:
    return dict(zip(p.slots.tolist(), p.counts.tolist(), strict=True))


def test_sarathi_keeps_decodes_going_within_512_tokens() -> None:
    bench = Bench()
    decode = bench.decode(first_s=0.1)
    prompt = bench.wait(2000)
    assert computed(plan(Sarathi(), bench.view())) == {decode: 1, prompt: 511}


def test_prefill_first_computes_whole_prompts_and_lets_decodes_wait() -> None:
    bench = Bench()
    decode = bench.decode(first_s=0.1)
    first, second, third = bench.wait(500), bench.wait(400), bench.wait(200)
    p = plan(PrefillFirst(budget=1000), bench.view())
    assert computed(p) == {first: 500, second: 400}
    assert p.reasons[decode] == Reason.WAIT_ORDER
    assert p.reasons[third] == Reason.WAIT_TOKENS


def test_prefill_first_cuts_only_a_prompt_that_no_step_can_hold() -> None:
    bench = Bench()
    long = bench.wait(2500)
    bench.wait(100)
    assert computed(plan(PrefillFirst(budget=1000), bench.view())) == {long: 1000}
    rest = Bench()
    partial, behind = rest.partial(2500, 2000), rest.wait(100)
    assert computed(plan(PrefillFirst(budget=1000), rest.view())) == {partial: 500, behind: 100}


def test_prefill_first_decodes_when_no_prompt_can_start() -> None:
    bench = Bench()
    decode = bench.decode(first_s=0.1)
    bench.wait(500)
    assert computed(plan(PrefillFirst(), bench.view(seats=1))) == {decode: 1}


def test_edf_serves_the_earliest_deadline_first_also_among_prompts_that_have_begun() -> None:
    bench = Bench()
    partial = bench.partial(300, 100, ttft_s=9.0)
    late, soon = bench.wait(300, ttft_s=5.0), bench.wait(300, ttft_s=1.0)
    assert computed(plan(EDF(budget=500), bench.view())) == {soon: 300, late: 200}
    assert partial not in computed(plan(EDF(budget=600), bench.view()))


def test_srpt_serves_the_shortest_rest_first_and_relegates_whom_it_cannot_save() -> None:
    bench = Bench()
    partial = bench.partial(1000, 900)
    long, short, lost = bench.wait(800), bench.wait(150), bench.wait(10, ttft_s=0.5)
    p = plan(SRPT(budget=500), bench.view(), now=1.0)
    assert computed(p) == {partial: 100, short: 150, long: 250}
    assert p.relegate == (lost,)
    assert lost in computed(plan(SRPT(budget=500, relegate=0), bench.view(), now=1.0))


def test_paper_lens_lets_its_target_grow_with_the_queue() -> None:
    bench = Bench()
    bench.decode(first_s=0.1)
    bench.wait(2000)
    assert plan(PaperLens(), bench.view()).notes["limit_ms"] == 15 + 35 / 5
    for _ in range(9):
        bench.wait(2000)
    assert plan(PaperLens(), bench.view()).notes["limit_ms"] == 50


def test_paper_lens_takes_the_shortest_prompts_in_chunks_until_the_target_is_reached() -> None:
    bench = Bench()
    bench.decode(first_s=0.1)
    long = bench.wait(4000)
    short = [bench.wait(n) for n in (300, 200, 250, 260, 270)]
    p = plan(PaperLens(), bench.view())
    assert computed(p)[short[1]] == 200
    assert long not in computed(p) or computed(p)[long] == 512
    assert p.predicted_s <= 0.050


def test_without_an_slo_edf_serves_in_turn_and_relegates_nobody() -> None:
    bench = Bench()
    late = bench.wait(100, ttft_s=1.0)
    none, later = (bench.wait(100 - i, arrival_s=0.1 * i, ttft_s=NAN, tpot_s=NAN) for i in range(2))
    due_after = bench.wait(100, ttft_s=40.0)
    p = EDF(relegate=1).plan(bench.view(), now=1000.0)
    assert p.relegate == (late, due_after)
    assert p.slots.tolist() == [none, later, late, due_after]
    assert EDF().plan(bench.view(), now=1000.0).slots.tolist() == [late, none, later, due_after]
    assert SRPT().plan(bench.view(), now=1000.0).relegate == (late, due_after)
