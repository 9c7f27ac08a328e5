"""The models kept for comparison, and making and rebuilding models by name."""

from __future__ import annotations

import random

import pytest

from nexusengine.errors import ConfigError
from nexusengine.perf.features import StepFeatures
from nexusengine.perf.line import LineModel
from nexusengine.perf.registry import MODELS, make_model, rebuild, scaled
from nexusengine.perf.surface import SurfaceModel
from nexusengine.wire import PerfSnapshot
from tests.support.devices import random_step


def test_a_line_learns_a_device_that_is_a_line_in_tokens() -> None:
    rng, model = random.Random(1), LineModel()
    for _ in range(400):
        step = random_step(rng)
        model.observe(step, 0.01 + 0.0002 * step.tokens)
    assert model.predict(StepFeatures(300, 5, 1)).mean_s == pytest.approx(0.07, rel=0.01)


def test_a_line_in_tokens_and_sequences_tells_the_two_apart() -> None:
    rng, model = random.Random(1), LineModel(by_sequences=True)
    for _ in range(400):
        step = random_step(rng)
        model.observe(step, 0.01 + 0.0002 * step.tokens + 0.001 * step.sequences)
    assert model.predict(StepFeatures(300, 1, 1)).mean_s == pytest.approx(0.071, rel=0.01)
    assert model.predict(StepFeatures(300, 50, 1)).mean_s == pytest.approx(0.12, rel=0.01)


def test_the_surface_learns_a_saturating_surface() -> None:
    def seconds(f: StepFeatures) -> float:
        filled = (1 - 2.718281828 ** (-0.5 * f.sequences)) * (1 - 2.718281828 ** (-0.01 * f.tokens))
        return float(0.005 + (0.001 + 5e-5 * f.tokens) / filled + 1e-4 * f.sequences)

    rng, model, errors = random.Random(1), SurfaceModel(), []
    for i in range(1000):
        step = random_step(rng)
        if i >= 600:
            errors.append(abs(model.predict(step).mean_s / seconds(step) - 1))
        model.observe(step, seconds(step))
    assert sum(errors) / len(errors) < 0.03


def test_a_model_that_is_not_known_is_refused_with_those_that_are() -> None:
    with pytest.raises(ConfigError, match=r"'magic'; known: online, paper-surface, line, line2"):
        make_model("magic")


@pytest.mark.parametrize("name", sorted(MODELS))
@pytest.mark.parametrize(
    "spoil",
    [
        lambda w: w[:-1],
        lambda w: (),
        lambda w: (float("nan"), *w[1:]),
        lambda w: (-1.0, *w[1:]),
    ],
)
def test_a_snapshot_that_makes_no_sense_is_refused(name: str, spoil: object) -> None:
    snapshot = make_model(name).snapshot()
    spoilt = PerfSnapshot(snapshot.kind, spoil(snapshot.weights), snapshot.quantile)  # type: ignore[operator]
    with pytest.raises(ValueError, match=r"snapshot|weights"):
        rebuild(spoilt)


def test_a_snapshot_of_an_unknown_kind_is_refused() -> None:
    for use in (rebuild, lambda s: scaled(s, 2.0)):
        with pytest.raises(ValueError, match=r"'future-9' is not known"):
            use(PerfSnapshot("future-9", (), 1.0))
