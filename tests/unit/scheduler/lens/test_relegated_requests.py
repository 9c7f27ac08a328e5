"""What LENS does with requests that are relegated: their share, restoring, refusing, and their KV."""

from __future__ import annotations

from nexusengine.scheduler.lens.policy import Lens
from nexusengine.scheduler.plan import Reason
from tests.support.lens_plans import computed, plan
from tests.support.lens_views import Bench

# ---- relegated: share, restoring, refusing --------------------------------------------------------------------------


def test_the_oldest_relegated_gets_its_share_although_others_fill_the_step() -> None:
    policy = Lens(share=0.1)
    bench = Bench()
    bench.decode(first_s=29.9, generated=2, arrival_s=29.0)
    old = bench.partial(3000, 500, ttft_s=1.0)
    bench.c.relegated[old] = True
    bench.wait(100_000, arrival_s=29.0, ttft_s=100.0)
    view = bench.view()
    reasons = []
    for step in range(20):
        now = 29.95 + 0.05 * step
        bench.c.generated_tokens[0] = 2 + step
        reasons.append(int(plan(view, now, policy).reasons[old]))
    assert reasons.count(Reason.AGED) > 2
    assert reasons.count(Reason.AGED) + reasons.count(Reason.RELEGATED) == 20


def test_a_prompt_that_was_relegated_wrongly_comes_back() -> None:
    bench = Bench()
    wronged = bench.wait(100, ttft_s=5.0, relegated=True)
    lost = bench.wait(100, ttft_s=0.5, relegated=True)
    p = plan(bench.view(), now=1.0)
    assert p.restore == (wronged,)
    assert lost not in p.restore


def test_a_resumed_request_that_decodes_in_time_is_relegated_no_longer() -> None:
    bench = Bench()
    slot = bench.decode(first_s=1.0, generated=2)
    bench.c.relegated[slot] = True
    assert plan(bench.view(), now=1.05).restore == (slot,)


def test_who_has_waited_for_long_is_refused_unless_it_computes() -> None:
    bench = Bench()
    bench.decode(first_s=99.0, generated=2, arrival_s=98.0)
    hopeless = bench.wait(5000, ttft_s=2.0, relegated=True)
    partial = bench.partial(5000, 100, ttft_s=2.0)
    bench.c.relegated[partial] = True
    view = bench.view(seats=2)
    assert plan(view, now=62.6).refuse == ()
    p = plan(view, now=62.8)
    assert p.refuse == (hopeless,)
    assert p.reasons[hopeless] == Reason.REFUSED
    assert plan(view, now=62.8, shed_s=0).refuse == ()


def test_a_long_wait_ends_even_for_one_that_lacks_only_blocks() -> None:
    bench = Bench()
    bench.decode(first_s=99.0, generated=2, arrival_s=98.0)
    first = bench.wait(5000, ttft_s=2.0, relegated=True)
    assert plan(bench.view(free=200), now=62.8).refuse == (first,)


def test_the_newest_relegated_are_refused_before_the_queue_is_full_of_them() -> None:
    bench = Bench(slots=22)  # two seats, twenty places in the queue
    bench.decode(first_s=0.9, generated=2)
    bench.decode(first_s=0.9, generated=2)
    waiting = [bench.wait(5000, arrival_s=0.01 * i, ttft_s=0.5, relegated=True) for i in range(20)]
    p = plan(bench.view(seats=2), now=1.0)
    assert p.refuse == (waiting[18], waiting[19])


# ---- KV -----------------------------------------------------------------------------------------------------------


def test_a_relegated_prompt_gives_its_kv_to_one_that_can_be_in_time() -> None:
    bench = Bench()
    relegated = bench.partial(3000, 1000, ttft_s=0.5)
    bench.c.relegated[relegated] = True
    fine = bench.wait(800, arrival_s=1.0)
    p = plan(bench.view(free=20), now=1.0)
    assert p.preempt == (relegated,)
    assert fine in computed(p)


def test_kv_is_not_taken_back_twice_within_a_while() -> None:
    policy, bench = Lens(), Bench()
    relegated = bench.partial(3000, 1000, ttft_s=0.5)
    bench.c.relegated[relegated] = True
    bench.decode(first_s=0.9, generated=2)
    bench.wait(800, arrival_s=1.0)
    view = bench.view(free=20)
    assert plan(view, 1.0, policy).preempt == (relegated,)
    assert plan(view, 2.0, policy).preempt == ()


def test_prompts_that_block_each_other_give_way_until_the_first_can_go_on() -> None:
    bench = Bench()
    first = bench.partial(200, 64)
    last = bench.partial(200, 64, arrival_s=1.0, ttft_s=20.0)
    p = plan(bench.view(free=0), now=1.5)
    assert p.preempt == (last,)
    assert first in computed(p)
