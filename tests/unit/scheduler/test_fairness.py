"""Who is over its share, and that service between tenants that wait stays within a bound."""

import numpy as np

from nexusengine.arrays import I4
from nexusengine.scheduler.fairness import TenantShares

NOBODY: I4 = np.zeros(0, np.int32)


class Engine:
    """Serves one request a step, `tokens` each, of a tenant within its share if one waits, else of the first."""

    def __init__(self, shares: TenantShares, names: list[str]) -> None:
        self.shares = shares
        self.tenants = np.array([shares.number_of(name) for name in names], np.int32)
        self.served = np.zeros(len(names))
        self.now = 0.0

    def step(self, waiting: list[int], tokens: int = 1000) -> int:
        """waiting: tenants that have a request, by number; the one that would be served first is first."""
        over = self.shares.over_share(self.tenants, np.array(waiting, np.int32), self.now)
        within = [slot for slot in waiting if over is None or not over[slot]]
        slot = (within or waiting)[0]
        self.shares.served(self.tenants[[slot]], np.array([tokens], np.int32), NOBODY)
        self.served[slot] += tokens
        self.now += 0.1
        return slot


def test_one_tenant_needs_no_counting() -> None:
    shares = TenantShares()
    assert shares.one_tenant
    assert shares.number_of(None) == 0
    assert shares.number_of("a") == 1
    assert not shares.one_tenant


def test_service_of_tenants_that_wait_differs_by_the_gap_at_most() -> None:
    engine = Engine(TenantShares(gap_s=10.0), ["flood", "a", "b"])
    widest = 0.0
    for _ in range(5000):
        engine.step([0, 1, 2])  # the first would always go first
        widest = max(widest, float(np.ptp(engine.served)))
    share_of_gap = 10.0 * 10_000 / 3  # ten seconds of an even share of 10,000 tokens a second
    assert share_of_gap * 0.9 < widest < share_of_gap * 1.1 + 1000
    assert engine.served.min() > 0.9 * engine.served.max()


def test_weights_are_shares() -> None:
    engine = Engine(TenantShares({"big": 3.0}, gap_s=1.0), ["big", "small"])
    for _ in range(4000):
        engine.step([0, 1])
    assert 2.8 < engine.served[0] / engine.served[1] < 3.2


def test_nobody_saves_up_service_while_nothing_of_it_waits() -> None:
    engine = Engine(TenantShares(gap_s=1.0), ["a", "b"])
    for _ in range(1000):
        engine.step([0])
    back = [engine.step([0, 1]) for _ in range(200)]
    assert 60 < back.count(0) < 140


def test_a_tenant_that_waits_alone_is_not_over_its_share() -> None:
    engine = Engine(TenantShares(gap_s=0.0), ["a", "b"])
    for _ in range(100):
        engine.step([0])
    assert engine.shares.over_share(engine.tenants, np.array([0], np.int32), engine.now) is None


def test_names_are_forgotten_when_there_are_too_many() -> None:
    shares = TenantShares()
    numbers = {shares.number_of(f"t{i}") for i in range(10_000)}
    assert len(numbers) < 5000
