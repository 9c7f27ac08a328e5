"""A device as its worker learned it: the model's own times, with the scatter that its bound stands for."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from nexusengine.perf.features import StepFeatures
from nexusengine.perf.registry import MODELS, make_model, rebuild
from nexusengine.profiles.base import ProfileIdentity
from nexusengine.profiles.learned import OCTAVES, LearnedProfile, octave
from nexusengine.wire import PerfSnapshot

IDENTITY = ProfileIdentity("cpu:1", "smollm2-135m", "load.jsonl", "resampled", 4096, 0)


def taught(name: str) -> PerfSnapshot:
    model = make_model(name)
    for tokens in (1, 2, 4, 8, 16, 32, 64) * 8:
        model.observe(StepFeatures(tokens, tokens, 0, 0.0, 300 * tokens), 0.02 + 0.001 * tokens)
        model.observe(StepFeatures(9 * tokens, 1, 1, 40.0 * tokens**2, 0), 0.03 + 0.004 * tokens)
    return model.snapshot()


SNAPSHOTS = {name: taught(name) for name in MODELS}


@settings(max_examples=60, deadline=None)
@given(
    name=st.sampled_from(sorted(SNAPSHOTS)),
    rows=st.lists(st.tuples(st.integers(1, 600) | st.just(1), st.integers(0, 4000)), min_size=1, max_size=40),
)
def test_a_step_takes_what_the_model_predicts(name: str, rows: list[tuple[int, int]]) -> None:
    counts, contexts = (np.array(column, np.int32) for column in zip(*rows, strict=True))
    profile = LearnedProfile(IDENTITY, SNAPSHOTS[name])
    wanted = rebuild(SNAPSHOTS[name]).predict(StepFeatures.of(counts, contexts)).mean_s
    assert profile.step_s(counts, contexts) == pytest.approx(wanted)


@pytest.mark.parametrize("name", sorted(SNAPSHOTS))
def test_a_run_of_decodes_is_its_steps_one_by_one(name: str) -> None:
    levels = tuple(1.0 + 0.1 * i for i in range(OCTAVES))
    profile = LearnedProfile(IDENTITY, SNAPSHOTS[name], scale=(levels, levels))
    contexts = np.array([10, 500, 3000], np.int32)
    one_by_one = [profile.step_s(np.ones(3, np.int32), contexts + i) for i in range(50)]
    assert profile.decode_run_s(contexts, 50) == pytest.approx(one_by_one)


def test_the_level_is_that_of_the_kind_and_size_of_a_step() -> None:
    snapshot = SNAPSHOTS["online"]
    decodes, mixed = [1.0] * OCTAVES, [1.0] * OCTAVES
    decodes[octave(4)], mixed[octave(100)] = 3.0, 5.0
    plain, scaled = LearnedProfile(IDENTITY, snapshot), LearnedProfile(IDENTITY, snapshot, scale=(decodes, mixed))

    def ratio(*counts: int) -> float:
        rows = np.array(counts, np.int32), np.full(len(counts), 100, np.int32)
        return scaled.step_s(*rows) / plain.step_s(*rows)

    assert ratio(1, 1, 1, 1) == pytest.approx(3.0)
    assert ratio(1, 1) == ratio(4) == ratio(200) == pytest.approx(1.0)
    assert ratio(99, 1) == pytest.approx(5.0)


def test_scatter_has_mean_one_and_the_bound_is_its_95th_percentile() -> None:
    profile = LearnedProfile(IDENTITY, SNAPSHOTS["online"])
    time = rebuild(SNAPSHOTS["online"]).predict(StepFeatures(4, 4, 0, 0.0, 2048))
    factor = time.upper_s / time.mean_s
    u = (np.arange(100_000) + 0.5) / 100_000
    assert profile.noise(u, False).mean() == pytest.approx(1.0, abs=0.001)
    assert profile.noise(np.array([0.95]), False)[0] == pytest.approx(factor, rel=0.02)


def test_octaves() -> None:
    assert [octave(n) for n in (0, 1, 2, 3, 4, 7, 8, 2**40)] == [0, 1, 2, 2, 3, 3, 4, OCTAVES - 1]
