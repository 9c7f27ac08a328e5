"""Expected lengths of answers: right shares, narrow groups first, conditional on what was generated already."""

import math

import numpy as np
import pytest

from nexusengine.scheduler.output_lengths import OutputLengths

RNG = np.random.default_rng(1)
LENGTHS = {
    "log-normal": np.exp(RNG.normal(5.0, 1.0, 5000)).astype(int) + 1,
    "short": RNG.integers(1, 6, 5000),
    "two kinds": np.where(RNG.random(5000) < 0.5, RNG.integers(5, 20, 5000), RNG.integers(500, 900, 5000)),
}


@pytest.mark.parametrize("name", LENGTHS)
@pytest.mark.parametrize("generated", [0, 3, 64, 600])
def test_nine_of_ten_answers_stay_within_what_was_expected(name: str, generated: int) -> None:
    lengths, within = OutputLengths(), []
    for tokens in LENGTHS[name].tolist():
        expected = lengths.quantile("chat", None, generated)
        if tokens > generated and not math.isnan(expected):
            assert expected > generated
            within.append(tokens <= expected)
        lengths.observe("chat", None, tokens)
    if len(within) > 400:  # of integers, a share of one value cannot be split
        assert 0.87 <= np.mean(within) <= (0.93 if name != "short" else 1.0)


def test_nothing_is_expected_before_enough_answers_have_ended() -> None:
    lengths = OutputLengths()
    assert math.isnan(lengths.quantile("chat", None, 0))
    for _ in range(30):
        lengths.observe("chat", None, 100)
    assert lengths.quantile("chat", None, 0) == pytest.approx(100, rel=0.1)
    assert math.isnan(lengths.quantile("chat", None, 500))  # no answer has been longer


def test_tenants_and_classes_have_lengths_of_their_own() -> None:
    lengths = OutputLengths()
    for _ in range(100):
        lengths.observe("chat", "a", 10)
        lengths.observe("chat", "b", 1000)
        lengths.observe("batch", None, 5000)
    assert lengths.quantile("chat", "a", 0) == pytest.approx(10, rel=0.1)
    assert lengths.quantile("chat", "b", 0) == pytest.approx(1000, rel=0.1)
    assert lengths.quantile("batch", "new", 0) == pytest.approx(5000, rel=0.1)
    assert lengths.quantile("chat", "new", 0) == pytest.approx(1000, rel=0.1)  # of both
    assert lengths.quantile("other", None, 0) > 4000  # of all


def test_traffic_that_changes_is_followed() -> None:
    lengths = OutputLengths()
    for tokens in [50] * 2000 + [800] * 2000:
        lengths.observe("chat", None, tokens)
    assert lengths.quantile("chat", None, 0, 0.5) == pytest.approx(800, rel=0.1)
