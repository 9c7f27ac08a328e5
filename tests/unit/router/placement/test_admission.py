"""Who is refused because he would be late: only where those who are taken in all the same are late too."""

from __future__ import annotations

import dataclasses

import pytest

from nexusengine.errors import Overloaded
from nexusengine.router.placement.admission import Admission, displaces
from nexusengine.router.placement.forecast import Forecast, forecast, snapshot
from nexusengine.router.placement.policy import Place, Refuse, WorkerView
from nexusengine.router.placement.prism import Prism
from nexusengine.types import SLO
from tests.support.router_fakes import load, pending, request, view

PROMPT = SLO(0.5, 0.05, patience=1.5)


def of(v: WorkerView) -> Forecast:
    return forecast(snapshot(v, 0.0, v.load.perf if v.load else None), v)


def full(length: int = 1000) -> WorkerView:
    """As much as can be done until 0.5 s, of prompts of one length."""
    return view("w0", load(pending=tuple(pending(0.5, length) for _ in range(int(0.45 / (22e-6 * length))))))


def seen(policy: Prism, in_time: int, late: int) -> None:
    for n in range(in_time + late):
        policy.observe(n < in_time)


def test_a_prompt_shorter_than_one_that_can_be_left_out_displaces_it_and_a_longer_one_does_not() -> None:
    row = of(full())
    assert displaces(row, request(prompt=300, slo=PROMPT), 300 * 22e-6, 0.0)
    assert not displaces(row, request(prompt=3000, slo=PROMPT), 3000 * 22e-6, 0.0)
    assert displaces(of(view("idle")), request(prompt=3000, slo=PROMPT), 3000 * 22e-6, 0.0)


def test_what_is_predicted_late_is_taken_in_until_experience_says_that_it_is_late() -> None:
    policy = Prism()
    long = request(prompt=3000, slo=PROMPT)
    decision = policy.place(long, [full()], 0.0)
    assert isinstance(decision, Place)
    assert decision.late
    seen(policy, 0, 60)
    refusal = policy.place(long, [full()], 1.0)
    assert isinstance(refusal, Refuse)
    assert refusal.code == Overloaded.code
    assert refusal.retry_after_s is not None
    assert 1.0 <= refusal.retry_after_s <= 60.0
    assert "0.5 s" in refusal.reason


def test_a_saturated_cluster_still_takes_what_is_in_time_or_shorter_than_what_it_makes_late() -> None:
    policy = Prism()
    policy.place(request(prompt=3000, slo=PROMPT), [full()], 0.0)
    seen(policy, 0, 60)
    for workers, prompt in (([view("idle")], 3000), ([full()], 300)):
        decision = policy.place(request(prompt=prompt, slo=PROMPT), workers, 0.1)
        assert isinstance(decision, Place)
        assert not decision.late


@pytest.mark.parametrize("slo", [SLO(0.5, 0.05), dataclasses.replace(PROMPT, patience=1000.0), None])
def test_those_who_may_be_late_are_served_late(slo: SLO | None) -> None:
    policy = Prism()
    policy.place(request(prompt=3000, slo=PROMPT), [full()], 0.0)
    seen(policy, 0, 60)
    assert isinstance(policy.place(request(prompt=3000, slo=slo), [full()], 0.1), Place)


def test_one_in_16_is_taken_in_to_see_and_experience_turns_back_only_when_it_is_clear() -> None:
    admission, late = Admission(), request(prompt=3000, slo=PROMPT)
    admission.refuses(late, 100.0, 0.0)
    for _ in range(60):
        admission.observe(False)
    refused = [admission.refuses(late, 100.0, 0.01 * n) for n in range(32)]
    assert refused.count(False) == 2
    for _ in range(2):
        admission.observe(True)
    assert admission.saturated(0.4), "two in time are chance"
    for _ in range(8):
        admission.observe(True)
    assert not admission.saturated(0.4)
    assert not admission.refuses(late, 100.0, 0.4)


def test_what_was_learned_is_forgotten_when_nothing_was_late_for_a_minute() -> None:
    admission, late = Admission(), request(prompt=3000, slo=PROMPT)
    admission.refuses(late, 100.0, 0.0)
    for _ in range(60):
        admission.observe(False)
    assert admission.refuses(late, 100.0, 59.0)
    assert not admission.saturated(119.5)
    assert not admission.refuses(late, 100.0, 119.5)
