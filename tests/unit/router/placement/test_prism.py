"""PRISM's choices, one reason at a time."""

from __future__ import annotations

import dataclasses
from collections import Counter

import msgspec
import pytest

from nexusengine.errors import ConfigError, ContextTooLong
from nexusengine.router.placement.forecast_matrix import ForecastMatrix
from nexusengine.router.placement.policy import Hold, Place, PlacementRequest, Refuse, WorkerView
from nexusengine.router.placement.prism import Prism, assess
from nexusengine.router.placement.registry import make_policy
from nexusengine.types import SLO
from nexusengine.wire import WorkerState
from tests.support.router_fakes import BATCH, given_to, load, pending, request, view


def place(workers: list[WorkerView], r: PlacementRequest | None = None, now: float = 0.0, **options: float) -> Place:
    decision = Prism(**options).place(r or request(), workers, now)
    assert isinstance(decision, Place)
    return decision


def test_the_first_requests_over_idle_identical_workers_are_spread_evenly() -> None:
    policy = Prism()
    sent: dict[str, list[PlacementRequest]] = {f"w{i}": [] for i in range(4)}
    for n in range(32):
        views = [view(w, unreported=tuple(rs), outstanding=len(rs)) for w, rs in sent.items()]
        r = request(f"r{n}", prompt=100 + 97 * (n % 7))
        decision = policy.place(r, views, 0.001 * n)
        assert isinstance(decision, Place)
        sent[decision.worker_id].append(r)
    counts = [len(rs) for rs in sent.values()]
    assert max(counts) <= 1.3 * 32 / 4
    tokens = [sum(r.prompt_tokens for r in rs) for rs in sent.values()]
    assert max(tokens) <= 1.3 * sum(tokens) / 4


def test_ties_rotate_over_all_equal_workers() -> None:
    policy = Prism()
    views = [view(f"w{i}") for i in range(5)]
    placed = [policy.place(request(str(n)), views, 0.0) for n in range(20)]
    assert Counter(p.worker_id for p in placed if isinstance(p, Place)) == {f"w{i}": 4 for i in range(5)}
    views[2] = view("w2", load(pending=(pending(0.4, 8000),)))  # the tie is now among four
    placed = [policy.place(request(str(n)), views, 0.0) for n in range(20)]
    assert Counter(p.worker_id for p in placed if isinstance(p, Place)) == {f"w{i}": 5 for i in (0, 1, 3, 4)}


def test_a_busy_worker_is_passed_over_while_another_is_quicker() -> None:
    busy = view("busy", load(pending=(pending(0.4, 10_000),)))
    decision = place([busy, view("idle")])
    assert decision.worker_id == "idle"
    assert decision.first_token_in_s == pytest.approx(0.005 + 500 * 20e-6 + 125e-6, rel=0.05)


def test_only_prompts_that_are_due_before_it_are_ahead_of_a_request() -> None:
    later = view("later", load(pending=(pending(9.0, 20_000),)))
    sooner = view("sooner", load(pending=(pending(0.45, 5_000),)))
    assert place([later, sooner]).worker_id == "later"


def test_a_device_that_cannot_keep_its_tpot_is_avoided_even_when_it_is_idle() -> None:
    slow = view("slow", load(speed=0.09))  # a decode step takes 56 ms
    fast = view("fast", load(pending=(pending(0.3, 6000),)))
    assert place([slow, fast]).worker_id == "fast"
    assert place([slow, fast], request(prompt=300, slo=SLO(0.5, 0.5))).worker_id == "slow"


def test_a_faster_worker_wins_until_its_queue_is_longer_in_time() -> None:
    slow = view("slow", load(speed=0.5))
    for ahead, expected in ((2000, "fast"), (20_000, "slow")):
        fast = view("fast", load(speed=2.0, pending=(pending(0.49, ahead),)))
        assert place([slow, fast], request(prompt=2000, slo=SLO(2.0, 0.05)), tie=0.0).worker_id == expected


def test_a_request_does_not_go_where_it_would_make_another_late() -> None:
    tight = view("tight", load(pending=tuple(pending(1.0, 1000) for _ in range(40))))  # some 60 ms to spare
    free = view("free", load(speed=0.5))
    r = request(prompt=4000, slo=SLO(0.9, 0.05))
    assert place([tight, free], r).worker_id == "free"
    decision = place([tight], r)
    assert decision.reason.startswith("relegated")
    matrix = ForecastMatrix()
    matrix.update([tight, free], 0.0)
    assert [harm == 1.0 for harm in assess(matrix, r, 0.0).harm] == [True, False]


def test_decodes_with_a_tighter_tpot_than_its_own_are_respected() -> None:
    crowded = msgspec.structs.replace(load(decodes=1850), decode_kv_tokens=150_000)  # a decode step of 48 ms
    views = [view("crowded", crowded), view("free", load(speed=0.4))]
    assert place(views, request(slo=BATCH, prompt=200), tie=0.0).worker_id == "free"


def test_a_full_kv_cache_counts_against_a_worker() -> None:
    full = view("full", load(kv_used_blocks=9_900))
    assert place([full, view("empty", load(speed=0.5))]).worker_id == "empty"


def test_a_cached_prefix_counts_as_work_that_need_not_be_done() -> None:
    r = request(prompt=8000, slo=SLO(1.0, 0.05), cached_tokens={"has": 7680})
    queue = (pending(0.3, 3000),)
    decision = place([view("has", load(pending=queue)), view("not")], r)
    assert decision.worker_id == "has"
    longer = tuple(pending(0.5, 1500) for _ in range(10))
    assert place([view("has", load(pending=longer)), view("not")], r).worker_id == "not", "time decides, not affinity"
    short = dataclasses.replace(r, cached_tokens={"has": 32})
    assert place([view("has", load(pending=queue)), view("not")], short).worker_id == "not"


def test_requests_without_a_promise_go_where_they_are_done_soonest() -> None:
    fast, slow = view("fast", load(speed=2.0)), view("slow")
    assert place([slow, fast], request(slo=None)).worker_id == "fast"
    given = given_to(*(request(str(n), prompt=1000, slo=None) for n in range(60)))
    behind = view("fast", load(speed=2.0, pending=tuple(pending(5.0, 1000) for _ in range(60))), **given)
    assert place([slow, behind], request(slo=None)).worker_id == "slow"


def test_what_nobody_can_serve_in_time_goes_where_it_waits_least() -> None:
    views = [view(f"w{i}", load(pending=(pending(0.4, n),))) for i, n in enumerate((16_000, 13_000, 15_000))]
    decision = place(views, request(prompt=20_000, slo=SLO(0.45, 0.05)))
    assert decision.worker_id == "w1"
    assert decision.reason.startswith("relegated")


def test_workers_that_may_not_take_it_are_never_chosen() -> None:
    ready = view("ready", load(pending=(pending(0.4, 30_000),)))
    others = [
        view("starting", state=WorkerState.STARTING),
        view("stalled", state=WorkerState.STALLED),
        view("gone", state=WorkerState.GONE),
        view("ejected", ejected="it failed 5 requests in a row"),
        view("slow start", slow_start=True),
    ]
    assert place([*others, ready]).worker_id == "ready"
    assert place(others).worker_id == "slow start"
    held = Prism().place(request(), others[:-1], 0.0)
    assert isinstance(held, Hold)
    assert held.reason == "it failed 5 requests in a row"


def test_a_request_nobody_could_ever_hold_is_refused() -> None:
    decision = Prism().place(request(prompt=40_000), [view("w0")], 0.0)
    assert isinstance(decision, Refuse)
    assert decision.code == ContextTooLong.code
    assert "32768" in decision.reason


def test_the_choice_is_the_same_whether_or_not_views_were_prepared_and_kept() -> None:
    kept, fresh = Prism(), Prism()  # they rotate among equals in step
    reports = [load(pending=(pending(0.4 + 0.1 * n, 900 * n + 1),)) for n in range(6)]
    views = [view(f"w{i}", reports[i]) for i in range(3)]
    for n in range(12):
        views[n % 3] = view(f"w{n % 3}", reports[n % 6], unreported=tuple(request(str(k)) for k in range(n % 4)))
        if n % 2:
            kept.prepare(views, 0.0)
        asked = request(prompt=300 * n + 1)
        assert kept.place(asked, views, 0.0) == fresh.place(asked, [dataclasses.replace(v) for v in views], 0.0)


def test_absurd_options_are_refused() -> None:
    for wrong in ("prism:delay=0", "prism:tie=-1", "prism:roll=0", "prism:speed=1", "prism:tie"):
        with pytest.raises(ConfigError):
            make_policy(wrong)


def test_a_tenant_over_its_share_leaves_most_of_the_time_to_the_others() -> None:
    soon, full = view("soon"), view("full", load(pending=(pending(0.4, 12_000),)))
    over = request(over_share=True)
    assert place([full, soon], over).worker_id == "soon"
    assert place([full]).worker_id == "full"  # in time, for one within its share
    refused = Prism().place(request(over_share=True, slo=SLO(0.5, 0.05, patience=1.5)), [full], 0.0)
    assert isinstance(refused, Refuse)
    assert refused.code == "overloaded"
    assert refused.retry_after_s is not None
    assert "share" in refused.reason


def test_a_tenant_over_its_share_whose_class_waits_for_ever_is_served_late() -> None:
    full = view("full", load(pending=(pending(0.4, 12_000),)))
    assert place([full], request(over_share=True, slo=SLO(0.5, 0.05))).worker_id == "full"
    assert place([full], request(over_share=True, slo=None)).worker_id == "full"
