"""The placement policies PRISM is measured against."""

from __future__ import annotations

from collections import Counter

import pytest

from nexusengine.errors import ConfigError
from nexusengine.router.placement.policy import Hold, Place, PlacementPolicy, PlacementRequest, WorkerView
from nexusengine.router.placement.registry import POLICIES, make_policy
from nexusengine.types import SLO
from nexusengine.wire import WorkerState
from tests.support.router_fakes import load, pending, request, view


def chosen(
    policy: PlacementPolicy | str, views: list[WorkerView], count: int = 1, r: PlacementRequest | None = None
) -> list[str]:
    policy = make_policy(policy) if isinstance(policy, str) else policy
    decisions = [policy.place(r or request(), views, 0.0) for _ in range(count)]
    assert all(isinstance(d, Place) for d in decisions)
    return [d.worker_id for d in decisions if isinstance(d, Place)]


def loaded(*outstanding: int) -> list[WorkerView]:
    return [view(f"w{i}", outstanding=n, outstanding_tokens=1000 * n) for i, n in enumerate(outstanding)]


@pytest.mark.parametrize("name", sorted(POLICIES))
def test_equal_idle_workers_get_equal_shares_and_ties_do_not_all_fall_to_the_first(name: str) -> None:
    counts = Counter(chosen(name, loaded(0, 0, 0, 0), 400))
    assert len(counts) == 4
    assert max(counts.values()) <= (1.3 if name == "p2c" else 1.01) * 100


@pytest.mark.parametrize("name", sorted(POLICIES))
def test_every_policy_holds_while_no_worker_is_ready_and_never_chooses_one_that_is_not(name: str) -> None:
    policy = make_policy(name)
    views = [view("a", state=WorkerState.STARTING), view("b", ejected="full"), view("c", state=WorkerState.GONE)]
    held = policy.place(request(), views, 0.0)
    assert isinstance(held, Hold)
    assert held.everyone
    assert set(chosen(policy, [*views, view("d")], 10)) == {"d"}
    assert policy.name == name or name == "least-outstanding"


@pytest.mark.parametrize("name", sorted(POLICIES))
def test_a_worker_in_slow_start_is_taken_only_when_all_are(name: str) -> None:
    assert set(chosen(name, [view("new", slow_start=True), view("old", outstanding=50)], 5)) == {"old"}
    assert set(chosen(name, [view("new", slow_start=True)], 5)) == {"new"}


@pytest.mark.parametrize("name", sorted(POLICIES))
def test_the_same_views_give_the_same_choices(name: str) -> None:
    views = loaded(3, 1, 4, 1, 5)
    assert chosen(name, views, 50) == chosen(name, views, 50)


def test_round_robin_ignores_load() -> None:
    assert Counter(chosen("round-robin", loaded(0, 100, 7), 30)) == {"w0": 10, "w1": 10, "w2": 10}


def test_the_veto_passes_over_a_worker_with_far_more_than_the_mean() -> None:
    assert Counter(chosen("rr-veto", loaded(4, 5, 6, 30), 30)) == {"w0": 10, "w1": 10, "w2": 10}
    assert set(chosen("rr-veto", loaded(4, 5, 6, 8), 8)) == {"w0", "w1", "w2", "w3"}
    assert set(chosen("rr-veto:slack=0,factor=1", loaded(4, 5, 6, 8), 8)) == {"w0", "w1"}


def test_least_requests_and_least_tokens_count_different_things() -> None:
    views = [view("few", outstanding=1, outstanding_tokens=9000), view("short", outstanding=5, outstanding_tokens=100)]
    assert chosen("least-requests", views) == ["few"]
    assert chosen("least-outstanding", views) == ["few"]
    assert chosen("least-tokens", views) == ["short"]


def test_of_two_drawn_workers_the_one_with_fewer_requests_is_taken() -> None:
    counts = Counter(chosen("p2c", loaded(0, 1, 2, 3), 600))
    assert counts["w0"] == pytest.approx(300, abs=50)  # in half of all pairs
    assert counts["w3"] == 0
    assert chosen("p2c:seed=1", loaded(0, 0, 0, 0), 20) != chosen("p2c:seed=2", loaded(0, 0, 0, 0), 20)


def test_capacity_weights_come_from_the_workers_models_or_from_the_user() -> None:
    fast, slow = load(speed=3.0), load(speed=1.0)
    views = [view("w0", fast, outstanding=4), view("w1", slow, outstanding=1)]
    assert chosen("capacity-weighted", views) == ["w0"]  # 5 / 3 < 2 / 1
    assert chosen("capacity-weighted:w0=1,w1=1", views) == ["w1"]
    with pytest.raises(ConfigError, match="w0=0"):
        make_policy("capacity-weighted:w0=0")


def test_a_settled_capacity_weight_stays() -> None:
    policy = make_policy("capacity-weighted")
    views = [view("w0", load(speed=2.0), outstanding=2), view("w1", load(speed=1.0), outstanding=1)]
    assert chosen(policy, views) == ["w0"]
    changed = [view("w0", load(speed=0.1), outstanding=2), view("w1", load(speed=1.0), outstanding=1)]
    assert chosen(policy, changed) == ["w0"]


def test_cache_aware_follows_the_longest_prefix_unless_load_is_uneven() -> None:
    r = request(prompt=1000, cached_tokens={"w0": 600, "w1": 900})
    assert chosen("cache-aware", loaded(0, 20, 0), 2, r) == ["w1", "w1"]
    assert chosen("cache-aware", loaded(3, 40, 1), 1, r) == ["w2"]
    little = request(prompt=1000, cached_tokens={"w1": 400})
    assert chosen("cache-aware", loaded(1, 2, 3), 1, little) == ["w0"]


def test_lmetric_multiplies_new_tokens_and_batch_size() -> None:
    views = [view("w0", load(pending=(pending(1.0, 500),)), outstanding=1), view("w1", outstanding=4)]
    assert chosen("lmetric", views, r=request(prompt=500)) == ["w0"]  # 1000 * 2 < 500 * 5
    assert chosen("lmetric", views, r=request(prompt=500, cached_tokens={"w1": 400})) == ["w1"]  # 100 * 5
    unreported = view("w0", outstanding=1, unreported=(request(prompt=3000),))
    assert chosen("lmetric", [unreported, views[1]], r=request(prompt=500)) == ["w1"]


def test_the_papers_score_adds_speed_load_mode_and_affinity() -> None:
    fast, slow = view("fast", load(speed=4.0)), view("slow")
    r = request(prompt=4000, slo=SLO(2.0, 0.05))
    assert chosen("paper-prism", [slow, fast], r=r) == ["fast"]
    busy = view("fast", load(speed=4.0, pending=(pending(1.0, 60_000),)))
    assert chosen("paper-prism", [slow, busy], r=r) == ["slow"]
    cached = request(prompt=1000, cached_tokens={"slow": 960}, slo=SLO(2.0, 0.05))
    assert chosen("paper-prism", [slow, fast], r=cached) == ["slow"]


def test_an_unknown_policy_or_option_is_named_with_what_is_known() -> None:
    with pytest.raises(ConfigError, match=r"'best'.*least-outstanding"):
        make_policy("best")
    with pytest.raises(ConfigError, match="least-requests"):
        make_policy("least-requests:x=1")
    with pytest.raises(ConfigError, match="key=number"):
        make_policy("p2c:seed=a")
