"""How long a step may take before a running request's next token is late."""

from __future__ import annotations

import math

import pytest

from nexusengine.scheduler.lens.step_limit import StepLimit, step_limit
from tests.support.lens_views import NAN, Bench, deadlines_of

CAP_S = 0.12


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
    nobody = limit_of(bench, now=1.0)
    assert (nobody.limit_s, nobody.slot, nobody.tightest_tpot_s, nobody.burst_s) == (CAP_S, -1, math.inf, 0.0)
    assert nobody.slo_missed.tolist() == []
    bench.decode(first_s=1.0, generated=100)
    assert (limit_of(bench, now=1.0).limit_s, limit_of(bench, now=1.0).slot) == (CAP_S, -1)


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
    bench.partial(100, 99)
    limit = limit_of(bench, now=1.0)
    assert (limit.slot, limit.limit_s, limit.tightest_tpot_s) == (-1, CAP_S, float("inf"))


def test_requests_without_an_slo_bear_any_step_and_are_never_lost() -> None:
    bench = Bench()
    bench.decode(first_s=1.0, generated=2, ttft_s=NAN, tpot_s=NAN)
    limit = limit_of(bench, now=900.0)
    assert (limit.limit_s, limit.slot, limit.tightest_tpot_s, limit.burst_s) == (CAP_S, -1, math.inf, 0.0)
    assert limit.slo_missed.tolist() == [False]
    promised = bench.decode(first_s=1.0, generated=2)
    limit = limit_of(bench, now=1.05)
    assert (limit.slot, limit.slo_missed.tolist()) == (promised, [False, False])
    assert limit.limit_s == pytest.approx(0.05)


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
