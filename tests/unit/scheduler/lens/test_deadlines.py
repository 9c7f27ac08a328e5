"""When each request's tokens are due, and which SLOs the device can keep."""

from __future__ import annotations

import math

import numpy as np
import pytest

from nexusengine.scheduler.attainable import attainable
from nexusengine.scheduler.lens.deadlines import FALLBACK
from tests.support.lens_views import NAN, Bench, Straight, deadlines_of


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


def test_a_prompt_longer_than_a_full_step_takes_several() -> None:
    """5 + 4 ms and 20 us a token each, and 1 ns a token pair: 0.34 + 0.13 s in two steps, 0.32 + 0.13 s in one."""
    bench = Bench()
    two_steps_s = 2 * 0.009 + 16_000 * 20e-6 + 0.5e-9 * 16_000**2
    for ttft_s, met in ((two_steps_s - 0.005, False), (two_steps_s + 0.001, True)):
        slot = bench.wait(16_000, ttft_s=ttft_s)
        view = bench.view()
        assert deadlines_of(view).attainable[slot] == met


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
