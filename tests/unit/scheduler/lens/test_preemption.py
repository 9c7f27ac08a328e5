"""Which running requests are preempted first."""

from __future__ import annotations

from nexusengine.scheduler.lens.preemption import victims
from tests.support.lens_views import Bench, deadlines_of


def test_lost_ones_give_way_first_then_the_loosest_then_prompts_then_the_newest() -> None:
    bench = Bench()
    old = bench.decode(first_s=0.5, arrival_s=0.0)
    new = bench.decode(first_s=0.5, arrival_s=0.2)
    prompt = bench.partial(100, 50, arrival_s=0.1)
    loose = bench.decode(first_s=0.5, arrival_s=0.0, tpot_s=0.5)
    lost = bench.decode(first_s=2.0, arrival_s=0.0, ttft_s=1.0)
    relegated = bench.partial(100, 50, arrival_s=0.3)
    bench.c.relegated[relegated] = True
    view = bench.view()
    assert list(victims(view, deadlines_of(view), 2.5)) == [relegated, lost, loose, prompt, new, old]
