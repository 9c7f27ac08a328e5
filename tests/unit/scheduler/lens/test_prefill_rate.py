"""What prompts cost, and how much of them can be computed by a deadline."""

from __future__ import annotations

import numpy as np
import pytest

from nexusengine.perf.features import StepFeatures
from nexusengine.scheduler.lens.prefill_rate import PrefillRate, marginal_costs, mixing_cost_s, prefill_rate
from nexusengine.scheduler.lens.step_limit import StepLimit
from tests.support.lens_views import Straight

CAP_S = 0.12


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
    assert p.step_s == 0.05
    assert p.prompts_s == pytest.approx(0.02)
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


def test_work_until_a_near_deadline_is_that_of_a_step_right_now() -> None:
    p = rate(0.05)
    assert p.work_until(np.array([0.04, 0.05, 0.06])) == pytest.approx([0.01, 0.02, 0.02 + 0.01 / 2.5])


def test_whole_steps_leave_no_work_for_those_who_are_due_long_before_a_step_ends() -> None:
    p = rate(0.05, coalescing=0)
    slack_s = np.array([0.034, 0.04, 0.05, 0.099, 0.11, 1.0])
    expected_s = [0.0, 0.01, 0.02, 0.02, 0.02 + 0.01 / 2.5, 0.02 + 0.90 / 2.5]
    assert p.work_in_whole_steps(slack_s) == pytest.approx(expected_s)
    assert (p.work_in_whole_steps(slack_s) <= p.work_until(slack_s)).all()


def test_no_more_is_counted_on_than_whole_steps_can_do() -> None:
    p = rate(0.05, coalescing=0)
    slack_s = np.arange(0.05, 2.0, 0.003)
    done_s = np.floor(slack_s / p.step_s) * p.prompts_s
    assert (p.work_in_whole_steps(slack_s) <= done_s + 1e-9).all()
    assert (p.work_in_whole_steps(slack_s) >= done_s - p.prompts_s).all()
