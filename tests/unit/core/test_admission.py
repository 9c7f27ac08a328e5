"""What is said of a request when it arrives, and what is remembered of how its tokens came."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from nexusengine.arrays import F8
from nexusengine.clock import VirtualClock
from nexusengine.core.admission import unattainable
from nexusengine.perf.features import StepFeatures
from nexusengine.perf.kinds import RecentError
from nexusengine.perf.model import StepTime
from nexusengine.perf.online import OnlineModel
from nexusengine.perf.registry import make_model
from nexusengine.types import SLO, TokenDelta
from tests.support.fakes import FakeExecutor, make_core, request


class Known(OnlineModel):
    """A performance model that is sure of itself: 10 ms a step and 0.2 ms a token, within 20 % to either side."""

    def __init__(self, error: RecentError = RecentError(100, 0.05)) -> None:  # noqa: B008
        super().__init__()
        self.error = error

    def predict(self, features: StepFeatures) -> StepTime:
        mean_s = 0.01 + 0.0002 * features.tokens
        return StepTime(mean_s, 1.25 * mean_s)

    def mean_s(self, tokens: F8, sequences: F8, prefills: F8, prefill_attention: F8, decode_kv_tokens: F8) -> F8:
        return 0.01 + 0.0002 * np.asarray(tokens, np.float64)

    def recent_error(self, features: StepFeatures) -> RecentError:
        return self.error


def of(slo: SLO, model: Any = None, tokens: int = 1000) -> bool:
    """On a device whose prompt of 1000 tokens takes 0.22 s in two steps, in the mean, and a decode 10.2 ms."""
    return unattainable(model or Known(), 512, tokens, slo)


def test_a_promise_is_unattainable_where_the_prompt_alone_or_one_decode_is_too_slow() -> None:
    assert not of(SLO(1.0, 0.1))
    assert of(SLO(0.15, 0.1))
    assert of(SLO(1.0, 0.005))
    assert of(SLO(1.0, 0.1, e2e_s=0.1))
    assert of(SLO(0.005, 0.1), tokens=1)


def test_it_is_not_called_unattainable_where_the_lower_bound_of_the_time_would_do() -> None:
    """The mean is 0.22 s and 10.2 ms; the bound is 1.25 times as long, so the lower one 0.176 s and 8.16 ms."""
    assert not of(SLO(0.18, 0.1))
    assert of(SLO(0.175, 0.1))
    assert not of(SLO(1.0, 0.0082))
    assert of(SLO(1.0, 0.0081))


@pytest.mark.parametrize("error", [RecentError(), RecentError(3, 0.01), RecentError(500, 0.3)])
def test_nothing_is_called_unattainable_by_a_model_that_is_not_trustworthy(error: RecentError) -> None:
    assert of(SLO(0.001, 0.0001))
    assert not of(SLO(0.001, 0.0001), Known(error))
    assert not of(SLO(0.001, 0.0001), make_model())


def first_and_last(slo: SLO | None, *, step_s: float = 0.1, tokens: int = 5, **options: Any) -> list[TokenDelta]:
    clock = VirtualClock()
    core = make_core(FakeExecutor(clock=clock, step_s=step_s, max_batch_tokens=16), clock=clock, **options)
    core.add(request("a", list(range(8)), tokens, slo=slo))
    found = []
    while core.has_work:
        found += [d for d in core.step() if d.service is not None]
    return found


def test_the_first_and_the_last_delta_say_who_serves() -> None:
    first, last = first_and_last(SLO(5.0, 1.0), name="w7")
    assert first.finish_reason is None
    assert last.finish_reason == "length"
    for delta in (first, last):
        assert delta.service is not None
        assert (delta.service.worker, delta.service.unattainable, delta.service.strict) == ("w7", False, True)
        assert delta.service.predicted_ttft_s is None, "the model has seen nothing yet"


def test_an_slo_that_cannot_be_met_is_served_all_the_same_and_says_so() -> None:
    clock = VirtualClock()
    core = make_core(FakeExecutor(clock=clock, step_s=0.1, max_batch_tokens=16), clock=clock)
    for n in range(8):
        core.add(request(f"before {n}", list(range(8)), 5))
        while core.has_work:
            core.step()
    core.add(request("a", list(range(8)), 5, slo=SLO(0.001, 1.0), arrival_s=clock.now()))
    found = []
    while core.has_work:
        found += [d.service for d in core.step() if d.service is not None]
    assert len(found) == 2
    for service in found:
        assert service.unattainable
        assert not service.strict


def test_one_late_token_breaks_the_strict_contract_and_it_stays_broken() -> None:
    in_time = first_and_last(SLO(0.15, 0.1))
    assert [d.service.strict for d in in_time if d.service] == [True, True]
    too_slow = first_and_last(SLO(0.15, 0.08))  # tokens at .1 .2 .3, due at .15 .23 .31 .39: the fourth is late
    assert [d.service.strict for d in too_slow if d.service] == [True, False]
    nothing_promised = first_and_last(None, step_s=1e4)
    assert [d.service.strict for d in nothing_promised if d.service] == [True, True]


def test_a_slot_that_is_used_again_starts_with_a_clean_record() -> None:
    clock = VirtualClock()
    core = make_core(FakeExecutor(clock=clock, step_s=1.0), clock=clock, max_running=1, max_waiting=1)
    for name, slo in (("a", SLO(0.5, 0.5)), ("b", SLO(50.0, 5.0))):
        core.add(request(name, [1, 2, 3], 2, slo=slo, arrival_s=clock.now()))
        (last,) = (d for _ in range(2) for d in core.step() if d.finish_reason)
        assert last.service is not None
        assert last.service.strict == (name == "b")
