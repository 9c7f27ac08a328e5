"""The breaker: what counts as a worker's fault, when it opens, and how it closes."""

from __future__ import annotations

import pytest

from nexusengine.errors import ERROR_TABLE
from nexusengine.router.breaker import FAULTS_TO_OPEN, FIRST_OPEN_S, LONGEST_OPEN_S, Answer, Breaker, classify

FAULT, SUCCESS, BACKPRESSURE = Answer.FAULT, Answer.SUCCESS, Answer.BACKPRESSURE


def opened(now: float = 0.0) -> Breaker:
    breaker = Breaker()
    for _ in range(FAULTS_TO_OPEN):
        breaker.answered(FAULT, now)
    return breaker


def probe(breaker: Breaker, now: float, answer: Answer) -> None:
    breaker.refresh(now)
    assert breaker.half_open
    assert breaker.ejected() is None
    breaker.probing = True
    assert breaker.ejected() == "its probe is under way"
    breaker.answered(answer, now, probe=True)


@pytest.mark.parametrize("code", sorted(ERROR_TABLE))
def test_only_5xx_answers_other_than_backpressure_are_faults(code: str) -> None:
    status = ERROR_TABLE[code].http_status
    expected = {429: BACKPRESSURE, 503: BACKPRESSURE, 504: Answer.IGNORED}.get(status)
    assert classify(code) is (expected or (SUCCESS if status < 500 else FAULT))


def test_an_answer_without_an_error_is_a_success_and_an_unknown_error_is_a_fault() -> None:
    assert classify(None) is SUCCESS
    assert classify("never heard of") is FAULT


def test_it_opens_after_faults_in_a_row_and_not_before() -> None:
    breaker = Breaker()
    for _ in range(10):
        for _ in range(FAULTS_TO_OPEN - 1):
            breaker.answered(FAULT, 0.0)
        breaker.answered(SUCCESS, 0.0)
    assert breaker.ejected() is None
    assert opened().ejected() == f"it failed {FAULTS_TO_OPEN} requests in a row"


@pytest.mark.parametrize("answer", [BACKPRESSURE, SUCCESS, Answer.IGNORED])
def test_nothing_but_faults_opens_it(answer: Answer) -> None:
    breaker = Breaker()
    for n in range(1000):
        breaker.answered(answer, float(n))
        breaker.refresh(float(n))
    assert breaker.ejected() is None
    assert not breaker.half_open


def test_while_open_it_lets_nothing_through_until_its_time_is_over() -> None:
    breaker = opened()
    breaker.refresh(FIRST_OPEN_S - 0.01)
    breaker.answered(SUCCESS, 0.5)  # of a request from before
    assert breaker.ejected() is not None
    probe(breaker, FIRST_OPEN_S, SUCCESS)
    assert breaker.ejected() is None
    assert not breaker.half_open


def test_a_probe_that_fails_opens_it_for_twice_as_long_up_to_a_limit() -> None:
    breaker, now, open_s = opened(), FIRST_OPEN_S, FIRST_OPEN_S
    for _ in range(10):
        probe(breaker, now, FAULT)
        open_s = min(2 * open_s, LONGEST_OPEN_S)
        breaker.refresh(now + open_s - 0.01)
        assert not breaker.half_open
        now += open_s
    probe(breaker, now, SUCCESS)
    for _ in range(FAULTS_TO_OPEN - 1):
        breaker.answered(FAULT, now)
    assert breaker.ejected() is None, "a success forgets what was before"


@pytest.mark.parametrize("answer", [BACKPRESSURE, Answer.IGNORED])
def test_a_probe_that_tells_nothing_is_followed_by_another(answer: Answer) -> None:
    breaker = opened()
    probe(breaker, FIRST_OPEN_S, answer)
    assert breaker.half_open
    assert breaker.ejected() is None
