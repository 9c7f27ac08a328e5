"""Requests that wait in vain on a saturated cluster are refused; elsewhere they are served late."""

from __future__ import annotations

from nexusengine import wire
from nexusengine.router.placement.prism import Prism
from nexusengine.types import SLO, EngineRequest, SamplingParams, Timings, TokenDelta
from nexusengine.wire import identity_of
from tests.support.router_driver import CLIENT, Router


def test_on_a_saturated_cluster_who_waited_as_long_as_its_class_allows_is_refused_with_retry_after() -> None:
    prism = Prism()
    router = Router("w0", policy=prism)
    router.ready("w0")
    promised = {"a": SLO(1.0, 0.1, patience=1.5), "b": SLO(1.0, 0.1), "c": SLO(1.0, 0.1, patience=1.5)}
    promised["late"] = SLO(0.001, 0.1)  # nobody can serve it in time
    for name, slo in promised.items():
        request = EngineRequest(
            name, [1] * (900 if name == "late" else 10), SamplingParams(seed=1, max_tokens=5), 0.0, slo=slo
        )
        router.core.on_client(CLIENT, wire.Submit(request), 0.0)
    router.deltas("w0", TokenDelta("c", (5,), timings=Timings(0.0)))
    router.sent()
    for _ in range(60):
        prism.observe(False)
    router.core.on_timer(1.4)
    assert router.finals() == {}
    router.core.on_timer(1.6)
    sent = router.sent()
    assert [m for m in sent[identity_of("w0", "e1")] if isinstance(m, wire.Cancel)] == [wire.Cancel("a")]
    (deltas,) = sent[CLIENT]
    assert isinstance(deltas, wire.Deltas)
    (delta,) = deltas.full
    assert (delta.request_id, delta.error_code) == ("a", "overloaded")
    assert delta.retry_after_s is not None
    counters = router.core.cluster().counters
    assert (counters["refused_late"], counters["refused_at_once"]) == (1, 0)


def test_a_cluster_that_is_not_saturated_serves_late() -> None:
    router = Router("w0", policy="prism")
    router.ready("w0")
    slo = SLO(1.0, 0.1, patience=1.5)
    request = EngineRequest("a", [1] * 10, SamplingParams(seed=1, max_tokens=5), 0.0, slo=slo)
    router.core.on_client(CLIENT, wire.Submit(request), 0.0)
    router.core.on_timer(1.6)
    assert router.finals() == {}
