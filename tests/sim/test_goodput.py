"""The search for goodput: its rule, its precision, and that giving up early changes no answer."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest

from nexusengine.errors import ConfigError
from nexusengine.sim import goodput as goodput_module
from nexusengine.sim.api import SimSpec, simulate
from nexusengine.sim.goodput import goodput
from nexusengine.sim.sweep import Point, specs_of, sweep
from tests.sim.fakes import FormulaProfile

SPEC = SimSpec(
    trace="lengths:input=100..1500,output=20..80",
    arrivals="poisson",
    duration_s=30.0,
    devices="a",
    max_model_len=4096,
)


def made_up(device: str, model: str) -> FormulaProfile:
    return FormulaProfile(50_000, speed=0.15)


def with_curve(monkeypatch: pytest.MonkeyPatch, curve: Callable[[float], tuple[float, float]]) -> list[float]:
    """Attainments as a function of the rate, in place of simulations; the rates that were asked for."""
    asked: list[float] = []

    def simulate(self: Any, spec: SimSpec, *needed: float) -> tuple[dict[str, Any], None]:
        assert spec.rate_rps is not None
        asked.append(spec.rate_rps)
        share, longest = curve(spec.rate_rps)
        return {"attainment": share, "attainment_longest_decile": longest, "rate": spec.rate_rps}, None

    monkeypatch.setattr(goodput_module._Search, "_simulate", simulate)
    return asked


@pytest.mark.parametrize("limit", [0.11, 0.8, 3.0, 40.0])
def test_it_finds_where_a_falling_curve_crosses_the_target(monkeypatch: pytest.MonkeyPatch, limit: float) -> None:
    with_curve(monkeypatch, lambda r: (1.0 if r <= limit else 0.5, 1.0))
    found = goodput(replace(SPEC, duration_s=600.0), precision=0.01)
    assert limit / 1.011 <= found.rate_rps <= limit
    assert found.metrics["rate"] == found.rate_rps


def test_a_good_guess_is_searched_around(monkeypatch: pytest.MonkeyPatch) -> None:
    asked = with_curve(monkeypatch, lambda r: (1.0 if r <= 3.1 else 0.5, 1.0))
    assert goodput(SPEC, first_rate_rps=3.0, growth=1.1).rate_rps == pytest.approx(3.1, rel=0.03)
    assert all(2.9 < rate < 3.4 for rate in asked)
    assert len(asked) < 6
    assert goodput(SPEC, first_rate_rps=60.0, growth=1.1).rate_rps == pytest.approx(3.1, rel=0.03)


def test_the_longest_tenth_can_be_what_limits(monkeypatch: pytest.MonkeyPatch) -> None:
    with_curve(monkeypatch, lambda r: (1.0 if r < 6 else 0.0, 1.0 if r < 2 else 0.7))
    assert goodput(SPEC).rate_rps == pytest.approx(2.0, rel=0.03)
    assert goodput(SPEC, longest_decile=0.7).rate_rps == pytest.approx(6.0, rel=0.03)


def test_what_lies_behind_a_fall_does_not_count(monkeypatch: pytest.MonkeyPatch) -> None:
    with_curve(monkeypatch, lambda r: (0.95 if r < 1.3 or 3.5 < r < 5 else 0.2, 1.0))
    found = goodput(SPEC)
    assert found.rate_rps == pytest.approx(1.3, rel=0.03)
    assert all(t.holds for t in found.tried if t.rate_rps <= found.rate_rps)
    assert any(not t.holds for t in found.tried)


def test_a_server_that_never_holds_has_no_goodput(monkeypatch: pytest.MonkeyPatch) -> None:
    with_curve(monkeypatch, lambda r: (0.0, 0.0))
    found = goodput(SPEC)
    assert (found.rate_rps, found.metrics) == (0.0, {})
    with_curve(monkeypatch, lambda r: (1.0, 1.0))
    with pytest.raises(ConfigError, match="still hold"):
        goodput(SPEC)


def test_means_over_seeds_decide(monkeypatch: pytest.MonkeyPatch) -> None:
    shares = {0: 1.0, 1: 0.82}
    monkeypatch.setattr(
        goodput_module._Search,
        "_simulate",
        lambda self, spec, *needed: (
            {"attainment": shares[spec.seed] if spec.rate_rps < 3 else 0.0, "attainment_longest_decile": 1.0},
            None,
        ),
    )
    assert goodput(SPEC, seeds=[0, 1]).rate_rps == pytest.approx(3.0, rel=0.03)
    assert goodput(SPEC, seeds=[1]).rate_rps == 0.0


@pytest.mark.parametrize(
    ("key", "value"), [("target", 1.2), ("longest_decile", -0.1), ("precision", 0.0), ("growth", 1.0)]
)
def test_senseless_targets_are_refused(key: str, value: float) -> None:
    with pytest.raises(ConfigError, match=key):
        goodput(SPEC, **{key: value})  # type: ignore[arg-type]


def test_at_the_goodput_promises_are_kept_and_a_little_above_they_are_not() -> None:
    found = goodput(SPEC, precision=0.05, load_profile=made_up)
    assert found.rate_rps > 1
    whole = {
        t.rate_rps: simulate(replace(SPEC, rate_rps=t.rate_rps), load_profile=made_up).metrics for t in found.tried
    }
    for t in found.tried:
        m = whole[t.rate_rps]
        assert t.holds == (m["attainment"] >= 0.9 and m["attainment_longest_decile"] >= 0.75)
        if t.cut_short:  # upper bounds of what would have come out
            assert t.attainment >= m["attainment"] - 1e-6
            assert t.longest_decile >= m["attainment_longest_decile"] - 1e-6
        else:
            assert t.attainment == m["attainment"]
    assert any(t.cut_short for t in found.tried)
    assert found.metrics["attainment"] == whole[found.rate_rps]["attainment"]


def test_seeds_given_up_early_are_those_that_could_not_hold_together() -> None:
    found = goodput(SPEC, seeds=[0, 1], precision=0.1, load_profile=made_up)
    for t in found.tried:
        runs = [simulate(replace(SPEC, rate_rps=t.rate_rps, seed=s), load_profile=made_up).metrics for s in (0, 1)]
        mean = sum(m["attainment"] for m in runs) / 2
        longest = sum(m["attainment_longest_decile"] for m in runs) / 2
        assert t.holds == (mean >= 0.9 - 1e-9 and longest >= 0.75 - 1e-9)


def test_a_sweep_has_every_combination_in_order_in_one_process_or_two() -> None:
    spec = replace(SPEC, devices="2xrtx4090", duration_s=5.0)
    specs = specs_of(spec, ["fcfs", "fcfs:budget=256"], ["round-robin"], [1.0, 2.0], [0, 1])
    done: list[Point] = []
    points = sweep(specs, 1, done.append)
    assert [(p.engine, p.rate_rps, p.seed) for p in points] == [
        (e, r, s) for e in ("fcfs", "fcfs:budget=256") for r in (1.0, 2.0) for s in (0, 1)
    ]
    assert done == points
    again = sweep(specs, 2)
    assert [p.metrics["e2e_ms"] for p in again] == [p.metrics["e2e_ms"] for p in points]
