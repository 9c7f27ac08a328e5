"""Which tenants the router holds to their share of the workers, and that policies are told."""

from __future__ import annotations

from collections.abc import Sequence

from nexusengine import wire
from nexusengine.router.ledger import Entry, Ledger
from nexusengine.router.placement.policy import Decision, PlacementRequest, WorkerView
from nexusengine.router.placement.prism import Prism
from nexusengine.router.tenants import ClusterShares
from nexusengine.types import SLO, EngineRequest, SamplingParams, TokenDelta
from tests.support.router_driver import CLIENT, Router

TOKENS = 1000


def engine_request(name: str, tenant: str | None, now: float = 0.0) -> EngineRequest:
    sampling = SamplingParams(seed=1, max_tokens=5)
    return EngineRequest(name, [1] * 10, sampling, now, slo=SLO(1.0, 0.1), tenant=tenant)


def waiting(*tenants: str | None) -> list[Entry]:
    ledger = Ledger()
    return [ledger.add(engine_request(str(n), tenant), CLIENT) for n, tenant in enumerate(tenants)]


def flooded(shares: ClusterShares, *beside: str | None, seconds: int = 60) -> None:
    """A minute in which `flood` gets 20 requests a second, the others one each, and all of them wait."""
    for now in range(seconds):
        for tenant in ("flood",) * 20 + beside:
            shares.arrived(tenant)
            shares.placed(tenant, TOKENS, 100.0)
        shares.look(waiting("flood", *beside), float(now))


def test_who_gets_far_more_than_others_who_wait_is_over_its_share() -> None:
    shares = ClusterShares()
    flooded(shares, "a", None)
    assert [shares.over(tenant) for tenant in ("flood", "a", None)] == [True, False, False]


def test_nobody_is_over_its_share_once_nobody_else_waits() -> None:
    shares = ClusterShares()
    flooded(shares, "a")
    shares.look(waiting("flood"), 61.0)
    assert not shares.over("flood")


def test_who_came_and_was_served_between_two_looks_waited_too() -> None:
    shares = ClusterShares()
    flooded(shares, "a")
    shares.arrived("a")
    shares.look(waiting("flood"), 61.0)
    assert shares.over("flood")


def test_equal_tenants_are_within_their_shares() -> None:
    shares = ClusterShares()
    for now in range(100):
        for tenant in ("a", "b", "c"):
            shares.arrived(tenant)
            shares.placed(tenant, TOKENS, 100.0)
        shares.look(waiting("a", "b", "c"), float(now))
        assert not any(shares.over(tenant) for tenant in ("a", "b", "c"))


def test_a_tenant_that_comes_after_the_last_look_is_within_its_share() -> None:
    shares = ClusterShares()
    flooded(shares, "a")
    assert not shares.over("new")


class Listening(Prism):
    """Remembers who was over its share, by request."""

    def __init__(self) -> None:
        super().__init__()
        self.over_share: dict[str, bool] = {}

    def place(self, request: PlacementRequest, workers: Sequence[WorkerView], now: float) -> Decision:
        self.over_share[request.request_id] = request.over_share
        return super().place(request, workers, now)


def test_the_policy_is_told_and_the_ledger_forgets_it() -> None:
    policy = Listening()
    router = Router("w0", policy=policy)
    router.ready("w0")
    for second in range(60):
        router.now = float(second)
        for n in range(21):
            tenant = "a" if n == 20 else "flood"
            router.core.on_client(
                CLIENT, wire.Submit(engine_request(f"{tenant}-{second}-{n}", tenant, router.now)), router.now
            )
            if n < 20:
                router.deltas("w0", TokenDelta(f"{tenant}-{second}-{n}", (1,)))
        router.core.on_timer(router.now)
    last = {name: over for name, over in policy.over_share.items() if name.split("-")[1] == "59"}
    assert {name.split("-")[0] for name, over in last.items() if over} == {"flood"}
    assert not any(entry.placement.over_share for entry in router.core.ledger.entries())
