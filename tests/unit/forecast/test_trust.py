"""When predictions are told."""

from __future__ import annotations

import pytest

from nexusengine.forecast.trust import TTFTErrors, is_trustworthy
from nexusengine.perf.features import StepFeatures
from nexusengine.perf.registry import MODELS, make_model

SHORT, LONG, DECODE = StepFeatures(40, 1, 1, 800.0), StepFeatures(400, 1, 1, 80_000.0), StepFeatures(4, 4, 0, 0.0, 400)


@pytest.mark.parametrize("name", MODELS)
def test_a_model_is_trusted_with_the_kinds_of_step_it_has_seen_and_with_no_others(name: str) -> None:
    model = make_model(name)
    assert not is_trustworthy(model, [SHORT])
    for _ in range(500):
        model.observe(SHORT, 0.3)
    assert is_trustworthy(model, [SHORT])
    assert not is_trustworthy(model, [SHORT, LONG])
    assert not is_trustworthy(model, [DECODE])
    assert is_trustworthy(model, [])


def test_a_model_whose_newest_errors_are_large_is_not_trusted_until_they_are_small_again() -> None:
    model = make_model()
    for _ in range(100):
        model.observe(SHORT, 0.3)
    for n in range(40):
        model.observe(SHORT, 0.1 if n % 2 else 0.9)
    assert not is_trustworthy(model, [SHORT])
    for _ in range(200):
        model.observe(SHORT, 0.3)
    assert is_trustworthy(model, [SHORT])


def test_what_was_foretold_wrongly_of_late_is_told_no_more_until_it_comes_right() -> None:
    errors = TTFTErrors()
    assert errors.small
    for _ in range(100):
        errors.learn(1.1, 1.0)
    errors.learn(1e9, 1.0)
    assert errors.small, "one insane prediction counts for 1"
    for _ in range(16):
        errors.learn(0.1, 1.0)
    assert not errors.small
    for _ in range(40):
        errors.learn(1.1, 1.0)
    assert errors.small
    assert errors.mean == pytest.approx(0.1, abs=0.1)
