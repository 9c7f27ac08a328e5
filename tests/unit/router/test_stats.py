"""What the router counts, and how it predicts when held requests will be placed."""

from __future__ import annotations

from typing import get_args

import pytest

from nexusengine.router.ledger import Ledger
from nexusengine.router.stats import FinishRate, PredictionErrors, RouterStats
from nexusengine.types import EngineRequest, FinishReason, SamplingParams


@pytest.mark.parametrize("reason", get_args(FinishReason))
def test_every_way_a_request_can_end_has_a_counter(reason: FinishReason) -> None:
    stats = RouterStats()
    before = stats.counters()
    stats.count_end(reason)
    assert stats.counters() == before | {f"requests_{reason}": 1}


def test_prediction_errors_are_among_the_counters_and_sum_up() -> None:
    stats = RouterStats()
    entry = Ledger().add(EngineRequest("a", [1] * 100, SamplingParams(seed=1), 0.0), b"client")
    stats.errors.observe_first_token(entry, 1.0)
    assert stats.errors == PredictionErrors(), "nothing was predicted"
    entry.placed_s, entry.first_token_in_s = 0.5, 0.25
    for now in (1.0, 0.625):
        stats.errors.observe_first_token(entry, now)
    stats.errors.observe_prefix(entry, "w0", 64)
    counters = stats.counters()
    assert (counters["first_tokens_off_by_15"], counters["first_tokens_off_by_50"]) == (2, 1)
    assert (counters["first_tokens_predicted"], counters["first_token_s"]) == (2, 0.625)
    assert counters["first_token_error_s"] == 0.25 + 0.125
    assert (counters["prefix_predicted_tokens"], counters["prefix_error_tokens"]) == (0, 64)


def test_one_insane_prediction_does_not_drown_the_others() -> None:
    errors = PredictionErrors()
    entry = Ledger().add(EngineRequest("a", [1] * 100, SamplingParams(seed=1), 0.0), b"client")
    for predicted_s in (1.1, 0.9, 1e7):
        entry.first_token_in_s = predicted_s
        errors.observe_first_token(entry, 1.0)
    assert errors.first_token_error_s == pytest.approx(0.1 + 0.1 + 1.0)
    assert (errors.first_tokens_off_by_15, errors.first_tokens_off_by_50) == (1, 1)


def test_the_time_until_held_requests_are_placed_follows_the_rate_at_which_requests_finish() -> None:
    rate = FinishRate()
    assert rate.drain_s(1000) == 5.0, "no rate is known yet"
    for second in range(1, 31):
        for _ in range(20):
            rate.add()
        rate.update(second - 0.5)  # too early
        rate.update(float(second))
    assert rate.drain_s(400) == pytest.approx(20.0, rel=0.01)
    assert (rate.drain_s(1), rate.drain_s(10**6)) == (1.0, 60.0)
