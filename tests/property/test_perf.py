"""Step-time models under arbitrary steps and durations: never negative, rising, exactly invertible, rebuildable."""

from __future__ import annotations

import math
import random

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from nexusengine.perf import basis
from nexusengine.perf.features import StepFeatures
from nexusengine.perf.model import PerformanceModel, Predictor
from nexusengine.perf.nnls import solve
from nexusengine.perf.online import OnlineModel
from nexusengine.perf.registry import MODELS, make_model, rebuild, scaled

FEW = settings(max_examples=40, deadline=None)
durations = st.one_of(
    st.floats(1e-4, 2.0), st.floats(allow_nan=True, allow_infinity=True), st.sampled_from([0.0, 5e-324, 1e300])
)


@st.composite
def steps(draw: st.DrawFn) -> StepFeatures:
    decodes, chunks = draw(st.integers(0, 300)), draw(st.integers(0, 4))
    if decodes + chunks == 0:
        decodes = 1
    tokens = decodes + sum(draw(st.integers(2, 4000)) for _ in range(chunks))
    pairs = float(draw(st.integers(0, 10**8))) if chunks else 0.0
    return StepFeatures(tokens, decodes + chunks, chunks, pairs, draw(st.integers(decodes, 10**6)) if decodes else 0)


lessons = st.lists(st.tuples(steps(), durations), max_size=60)


def learn(model: PerformanceModel, observed: list[tuple[StepFeatures, float]]) -> PerformanceModel:
    for step, seconds in observed:
        model.observe(step, seconds)
    return model


def mean_of_many(model: Predictor, many: list[StepFeatures]) -> np.ndarray:
    columns = [np.array([getattr(s, name) for s in many], np.float64) for name in StepFeatures._fields]
    return model.mean_s(*columns)


@FEW
@given(st.sampled_from(sorted(MODELS)), lessons, st.lists(steps(), min_size=1, max_size=10))
def test_every_model_predicts_finite_positive_times_whatever_it_was_taught(
    name: str, observed: list[tuple[StepFeatures, float]], asked: list[StepFeatures]
) -> None:
    model = learn(make_model(name), observed)
    for step, mean_s in zip(asked, mean_of_many(model, asked).tolist(), strict=True):
        time = model.predict(step)
        assert 0.0 < time.mean_s <= time.upper_s < math.inf
        assert mean_s == pytest.approx(time.mean_s, rel=1e-9)


@FEW
@given(lessons, steps(), st.integers(1, 3000), st.integers(0, 10**7))
def test_the_online_model_rises_in_every_argument(
    observed: list[tuple[StepFeatures, float]], step: StepFeatures, more: int, pairs: int
) -> None:
    model = learn(OnlineModel(), observed)
    before_s = model.predict(step).mean_s
    grown = [
        step._replace(tokens=step.tokens + more),
        step._replace(sequences=step.sequences + more),
        step._replace(prefills=step.prefills + 1),
        step._replace(decode_kv_tokens=step.decode_kv_tokens + more),
    ]
    if step.prefills:
        grown.append(step._replace(prefill_attention=step.prefill_attention + pairs))
    for larger in grown:
        assert model.predict(larger).mean_s >= before_s * (1 - 1e-12)


@FEW
@given(st.sampled_from(sorted(MODELS)), lessons, st.lists(steps(), min_size=1, max_size=10))
def test_a_rebuilt_predictor_predicts_exactly_the_same(
    name: str, observed: list[tuple[StepFeatures, float]], asked: list[StepFeatures]
) -> None:
    model = learn(make_model(name), observed)
    snapshot = model.snapshot()
    again = rebuild(snapshot)
    twice = rebuild(scaled(snapshot, 2.0))
    assert min(snapshot.weights[: basis.TERMS if name == "online" else 2]) >= 0.0
    for step in asked:
        assert again.predict(step) == model.predict(step)
        if model.predict(step).mean_s > 1e-5:
            assert twice.predict(step).mean_s == pytest.approx(2 * model.predict(step).mean_s, rel=1e-9)
    assert np.array_equal(mean_of_many(again, asked), mean_of_many(model, asked))


@FEW
@given(st.integers(0, 2**32 - 1))
def test_non_negative_least_squares_meets_its_optimality_conditions(seed: int) -> None:
    rng = np.random.default_rng(seed)
    n = int(rng.integers(1, 12))
    rows = rng.normal(size=(30, n)) + rng.normal()
    target = rows @ np.maximum(rng.normal(size=n), 0.0) + 0.1 * rng.normal(size=30)
    gram, moment = rows.T @ rows, rows.T @ target
    weights = solve(gram, moment, np.maximum(rng.normal(size=n), 0.0))
    gain = moment - gram @ weights
    tolerance = 1e-6 * (np.abs(moment).max() + 1.0)
    assert (weights >= 0.0).all()
    assert (gain <= tolerance).all()
    assert np.abs(gain[weights > 0.0]).max(initial=0.0) <= tolerance


@settings(max_examples=10, deadline=None)
@given(st.randoms(use_true_random=False), st.sampled_from(["decodes first", "prompts first", "mixed"]))
def test_the_order_in_which_kinds_of_step_come_makes_little_difference(rng: random.Random, order: str) -> None:
    def step_s(f: StepFeatures) -> float:
        return 0.012 + 1e-4 * f.tokens + 1e-7 * f.decode_kv_tokens + (3e-9 * f.prefill_attention + 0.002) * f.prefills

    decodes = [StepFeatures(n, n, 0, 0.0, n * rng.randrange(10, 2000)) for n in (rng.randrange(1, 40),) * 200]
    prompts = [
        StepFeatures(q, 1, 1, q * (rng.randrange(3000) + q / 2), 0)
        for q in (rng.randrange(16, 512) for _ in range(200))
    ]
    all_steps = prompts + decodes if order == "prompts first" else decodes + prompts
    if order == "mixed":
        rng.shuffle(all_steps)
    model = learn(OnlineModel(), [(s, step_s(s)) for s in all_steps])
    errors = [abs(model.predict(s).mean_s / step_s(s) - 1.0) for s in all_steps]
    assert sum(errors) / len(errors) < 0.03
