"""Requests of a tenant over its share: deferred first, last to start where room is short, else as everybody's."""

from dataclasses import replace

import numpy as np
import pytest

from nexusengine.scheduler.plan import StepPlan
from tests.support.lens_plans import computed, plan
from tests.support.lens_views import NAN, Bench


def planned(bench: Bench, *over: int, **options: int) -> StepPlan:
    """A plan where the slots `over` are those of a tenant over its share."""
    view = bench.view(**options)
    over_share = np.zeros(len(bench.c.known_tokens), np.bool_)
    over_share[list(over)] = True
    return plan(replace(view, over_share=over_share))


def test_who_is_over_its_share_is_deferred_although_another_is_longer() -> None:
    bench = Bench()
    short = bench.wait(3000, ttft_s=0.12)
    long = bench.wait(4000, ttft_s=0.13)
    found = computed(planned(bench))
    assert found[short] == 3000
    assert found.get(long, 0) < 4000
    found = computed(planned(bench, short))
    assert found[long] == 4000
    assert found.get(short, 0) < 3000


def test_where_all_can_be_in_time_the_share_changes_nothing() -> None:
    bench = Bench()
    for ttft_s in (1.0, 2.0, 3.0):
        bench.wait(500, ttft_s=ttft_s)
    assert computed(planned(bench, 0)) == computed(planned(bench)) == {0: 500, 1: 500, 2: 500}


@pytest.mark.parametrize(("running", "starts"), [(10, True), (18, False)])
def test_over_its_share_a_request_starts_only_while_slots_stay_free(running: int, starts: bool) -> None:
    bench = Bench()
    flood, other = bench.wait(100, ttft_s=1.0), bench.wait(100, ttft_s=2.0)
    for _ in range(running):
        bench.decode(first_s=0.0)
    found = computed(planned(bench, flood, seats=20))
    assert (flood in found, other in found) == (starts, True)


def test_without_an_slo_others_go_first() -> None:
    bench = Bench()
    slots = [bench.wait(8000, ttft_s=NAN, tpot_s=NAN, arrival_s=float(i)) for i in range(2)]
    assert computed(planned(bench))[slots[0]] == 8000
    assert computed(planned(bench, slots[0]))[slots[1]] == 8000
