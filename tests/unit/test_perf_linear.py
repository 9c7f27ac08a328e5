"""The first step-time model learns, stays non-negative, and can be inverted."""

import math
import random

import pytest

from nexusengine.perf.features import StepFeatures
from nexusengine.perf.linear import LinearModel


def _measured(f: StepFeatures) -> float:
    return 0.02 + 0.004 * f.tokens / 100 + 0.003 * f.prefill_attention / 1e6 + 0.002 * f.decode_kv_tokens / 1e4


def _random_step(rng: random.Random) -> StepFeatures:
    decodes, chunk, context = rng.randrange(1, 64), rng.choice([0, 128, 512]), rng.randrange(0, 2000)
    return StepFeatures(
        tokens=decodes + chunk,
        sequences=decodes + (chunk > 0),
        prefills=int(chunk > 0),
        prefill_attention=chunk * (context + chunk / 2),
        decode_kv_tokens=decodes * rng.randrange(10, 2000),
    )


def test_it_learns_a_device_from_its_steps() -> None:
    rng, model = random.Random(1), LinearModel()
    errors = []
    for _ in range(600):
        step = _random_step(rng)
        seconds = _measured(step) * rng.uniform(0.98, 1.02)
        errors.append(abs(model.predict(step).mean_s - seconds) / seconds)
        model.observe(step, seconds)
    assert sum(errors[-200:]) / 200 < 0.03


def test_the_upper_bound_holds_in_about_95_percent_of_steps() -> None:
    rng, model, held = random.Random(2), LinearModel(), []
    for _ in range(4000):
        step = _random_step(rng)
        seconds = _measured(step) * rng.lognormvariate(0.0, 0.1)
        held.append(seconds <= model.predict(step).upper_s)
        model.observe(step, seconds)
    assert 0.93 <= sum(held[1000:]) / 3000 <= 0.97


def test_the_inverse_is_the_largest_chunk_within_the_budget() -> None:
    rng, model = random.Random(3), LinearModel()
    for _ in range(200):
        step = _random_step(rng)
        model.observe(step, _measured(step))
    base = StepFeatures(20, 20, 0, 0.0, 20_000)
    q = model.max_tokens(0.06, base, context=300, limit=4096)

    def upper_s(q: int) -> float:
        return model.predict(StepFeatures(20 + q, 21, 1, q * (300 + q / 2), 20_000)).upper_s

    assert 1 < q < 4096
    assert upper_s(q) <= 0.06 < upper_s(q + 1)
    assert model.max_tokens(0.0, base, context=300, limit=4096) == 0


@pytest.mark.parametrize("seconds", [math.nan, math.inf, 0.0, -1.0])
def test_a_duration_that_is_no_duration_teaches_nothing(seconds: float) -> None:
    model = LinearModel()
    before = model.snapshot()
    model.observe(StepFeatures(10, 10), seconds)
    assert model.snapshot() == before
