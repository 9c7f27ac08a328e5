"""Performance models of simulations: the one that knows, and the one that errs."""

from __future__ import annotations

import numpy as np
import pytest

from nexusengine.errors import ConfigError
from nexusengine.perf.features import StepFeatures
from nexusengine.perf.registry import rebuild
from nexusengine.profiles.base import DeviceProfile
from nexusengine.profiles.registry import load_profile
from nexusengine.sim.models import make_sim_model
from tests.sim.fakes import FormulaProfile

DECODES = StepFeatures(12, 12, 0, 0.0, 12 * 701)
MIXED = StepFeatures(12 + 900, 14, 2, 450 * (300 + 225.0) * 2, 12 * 701)


def batch(decodes: int, context: int, chunks: list[tuple[int, int]]) -> tuple[np.ndarray, np.ndarray]:
    counts = np.array([1] * decodes + [q for q, _ in chunks], np.int32)
    return counts, np.array([context] * decodes + [c for _, c in chunks], np.int32)


@pytest.mark.parametrize("device", ["formula", "rtxpro6000"])
def test_the_oracle_answers_the_profiles_mean(device: str) -> None:
    profile: DeviceProfile = FormulaProfile() if device == "formula" else load_profile(device)
    oracle = make_sim_model("oracle", profile)
    assert oracle.predict(DECODES).mean_s == pytest.approx(profile.step_s(*batch(12, 700, [])), rel=1e-6)
    expected = profile.step_s(*batch(12, 700, [(450, 300), (450, 300)]))
    assert oracle.predict(MIXED).mean_s == pytest.approx(expected, rel=1e-3)
    assert oracle.predict(MIXED).upper_s > oracle.predict(MIXED).mean_s
    columns = np.array(
        [[f.tokens, f.sequences, f.prefills, f.prefill_attention, f.decode_kv_tokens] for f in (DECODES, MIXED)]
    )
    assert oracle.mean_s(*columns.T).tolist() == [oracle.predict(DECODES).mean_s, oracle.predict(MIXED).mean_s]


@pytest.mark.parametrize("factor", [0.5, 1.0, 2.0])
def test_a_scaled_model_errs_by_its_factor_here_and_in_the_router(factor: float) -> None:
    profile = load_profile("rtxpro6000")
    right, wrong = make_sim_model("online", profile), make_sim_model(f"scaled:{factor}", profile)
    rng = np.random.default_rng(1)
    for _ in range(50):
        decodes, context, chunk = int(rng.integers(1, 64)), int(rng.integers(10, 2000)), int(rng.integers(2, 1024))
        counts, contexts = batch(decodes, context, [(chunk, 0)])
        for model in (right, wrong):
            model.observe(StepFeatures.of(counts, contexts), profile.step_s(counts, contexts))
    for f in (DECODES, MIXED):
        assert wrong.predict(f).mean_s == pytest.approx(factor * right.predict(f).mean_s)
        assert wrong.predict(f).upper_s == pytest.approx(factor * right.predict(f).upper_s)
        assert rebuild(wrong.snapshot()).predict(f).mean_s == pytest.approx(wrong.predict(f).mean_s)


def test_what_the_oracle_shows_to_the_router_is_close_to_it() -> None:
    oracle = make_sim_model("oracle", load_profile("rtxpro6000"))
    shown = rebuild(oracle.snapshot())
    for f in (DECODES, MIXED):
        assert shown.predict(f).mean_s == pytest.approx(oracle.predict(f).mean_s, rel=0.15)


def test_an_online_model_starts_calibrated() -> None:
    profile = load_profile("rtx4090")
    model = make_sim_model("online", profile)
    for counts, contexts in (batch(8, 800, []), batch(8, 800, [(512, 0)])):
        expected = profile.step_s(counts, contexts)
        assert model.predict(StepFeatures.of(counts, contexts)).mean_s == pytest.approx(expected, rel=0.25)


@pytest.mark.parametrize("spec", ["scaled", "scaled:0", "scaled:x", "perfect", ""])
def test_an_unknown_model_is_refused(spec: str) -> None:
    with pytest.raises(ConfigError, match="oracle or scaled:F"):
        make_sim_model(spec, FormulaProfile())
