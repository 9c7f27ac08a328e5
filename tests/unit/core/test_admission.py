"""What is said of a request when it arrives, and what is remembered of how its tokens came."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
import pytest

from nexusengine.clock import VirtualClock
from nexusengine.core.admission import first_token_in_s, unattainable
from nexusengine.perf import basis
from nexusengine.perf.curve import Curve
from nexusengine.perf.features import StepFeatures
from nexusengine.scheduler.baselines.fcfs import FCFS
from nexusengine.scheduler.plan import StepPlan
from nexusengine.scheduler.view import EngineView, RequestColumns
from nexusengine.types import SLO, TokenDelta
from tests.support.fakes import FakeExecutor, make_core, request

WEIGHTS = {basis.ONE: 0.01, basis.SLOPE: 0.02, basis.ATTENTION: 0.005, basis.KV: 0.003}
MODEL = Curve([WEIGHTS.get(i, 0.0) for i in range(basis.TERMS)], seen=1e6)
NOBODY = np.zeros(0, np.int32)


def view(columns: RequestColumns, running: np.ndarray, waiting: np.ndarray) -> EngineView:
    return EngineView(columns, running, waiting, 100, 100, 16, max_batch_tokens=512, max_running=64, model=MODEL)


def by_steps(prompts: list[tuple[int, int]], decodes: list[int], limit: int) -> float:
    """The same time step by step: prompts of (computed, known) tokens one after the other, the last is asked for."""
    time_s, left = 0.0, [(done, known) for done, known in prompts]
    while left:
        room, counts, contexts = limit - len(decodes), [1] * len(decodes), list(decodes)
        while left and room:
            done, known = left[0]
            taken = min(room, known - done)
            counts.append(taken)
            contexts.append(done)
            room -= taken
            if done + taken == known:
                left.pop(0)
            else:
                left[0] = (done + taken, known)
        time_s += MODEL.predict(StepFeatures.of(np.array(counts, np.int32), np.array(contexts, np.int32))).mean_s
    return time_s


@pytest.mark.parametrize(
    ("partial", "waiting", "decodes", "own"),
    [
        ([], [], [], 200),
        ([], [], [], 3000),
        ([(512, 2048)], [700, 300], [100, 900, 30], 1500),
        ([], [100] * 20, [50] * 64, 10),
    ],
)
def test_the_first_token_is_foreseen_as_if_everything_ahead_were_computed_first(
    partial: list[tuple[int, int]], waiting: list[int], decodes: list[int], own: int
) -> None:
    c = RequestColumns.empty(128)
    rows = [*partial, *((0, known) for known in waiting), *((known, known + 1) for known in decodes)]
    for slot, (computed, known) in enumerate(rows):
        c.computed_tokens[slot], c.known_tokens[slot] = computed, known
    first_decode = len(partial) + len(waiting)
    running = np.array([*range(len(partial)), *range(first_decode, len(rows))], np.int32)
    waiting_slots = np.arange(len(partial), first_decode, dtype=np.int32)
    foreseen_s = first_token_in_s(view(c, running, waiting_slots), own)
    truth_s = by_steps([*partial, *((0, known) for known in waiting), (0, own)], decodes, 512)
    assert foreseen_s == pytest.approx(truth_s, rel=0.02)


def test_who_was_relegated_is_not_ahead_and_a_cached_prefix_is_not_computed() -> None:
    c = RequestColumns.empty(8)
    c.known_tokens[0] = 4000
    one = np.array([0], np.int32)

    def foreseen_s() -> float:
        return first_token_in_s(view(c, NOBODY, one), 10)

    behind_all = foreseen_s()
    c.cached_tokens[0] = 3900
    assert foreseen_s() < behind_all / 3
    c.relegated[0] = True
    alone = first_token_in_s(view(c, NOBODY, NOBODY), 10)
    assert foreseen_s() == alone


def test_a_promise_is_unattainable_where_the_prompt_alone_or_one_decode_is_too_slow() -> None:
    def of(slo: SLO) -> bool:
        return unattainable(view(RequestColumns.empty(1), NOBODY, NOBODY), 1000, slo)

    assert not of(SLO(1.0, 0.1))
    assert of(SLO(0.1, 0.1))
    assert of(SLO(1.0, 0.01))
    assert of(SLO(1.0, 0.1, e2e_s=0.1))


def first_and_last(slo: SLO | None, *, step_s: float = 0.1, tokens: int = 5, **options: Any) -> list[TokenDelta]:
    clock = VirtualClock()
    core = make_core(FakeExecutor(clock=clock, step_s=step_s, max_batch_tokens=16), clock=clock, **options)
    core.add(request("a", list(range(8)), tokens, slo=slo))
    found = []
    while core.has_work:
        found += [d for d in core.step() if d.service is not None]
    return found


def test_the_first_and_the_last_delta_say_who_serves_and_what_was_foreseen() -> None:
    first, last = first_and_last(SLO(5.0, 1.0), name="w7")
    assert first.finish_reason is None
    assert last.finish_reason == "length"
    for delta in (first, last):
        assert delta.service is not None
        assert (delta.service.worker, delta.service.unattainable, delta.service.strict) == ("w7", False, True)
        assert delta.service.predicted_ttft_s > 0


def test_an_slo_that_cannot_be_met_is_served_all_the_same_and_says_so() -> None:
    for delta in first_and_last(SLO(0.001, 1.0)):
        assert delta.service is not None
        assert delta.service.unattainable
        assert not delta.service.strict


def test_one_late_token_breaks_the_strict_contract_and_it_stays_broken() -> None:
    in_time = first_and_last(SLO(0.15, 0.1))
    assert [d.service.strict for d in in_time if d.service] == [True, True]
    too_slow = first_and_last(SLO(0.15, 0.08))  # tokens at .1 .2 .3, due at .15 .23 .31 .39: the fourth is late
    assert [d.service.strict for d in too_slow if d.service] == [True, False]
    without_slo = first_and_last(None, step_s=1e4)
    assert [d.service.strict for d in without_slo if d.service] == [True, True]


def test_a_slot_that_is_used_again_starts_with_a_clean_record() -> None:
    clock = VirtualClock()
    core = make_core(FakeExecutor(clock=clock, step_s=1.0), clock=clock, max_running=1, max_waiting=1)
    for name, slo in (("a", SLO(0.5, 0.5)), ("b", SLO(50.0, 5.0))):
        core.add(request(name, [1, 2, 3], 2, slo=slo, arrival_s=clock.now()))
        (last,) = (d for _ in range(2) for d in core.step() if d.finish_reason)
        assert last.service is not None
        assert last.service.strict == (name == "b")


class Foreseeing(FCFS):
    """Says of every slot that its first token comes 7 s from now, but of `silent_of`."""

    silent_of = -1

    def plan(self, view: EngineView, now: float) -> StepPlan:
        first_token_s = np.full(len(view.columns.known_tokens), now + 7.0)
        first_token_s[self.silent_of] = np.nan
        return replace(super().plan(view, now), first_token_s=first_token_s)


def test_a_policy_that_foresees_first_tokens_is_believed_once() -> None:
    clock, policy = VirtualClock(), Foreseeing()
    core = make_core(FakeExecutor(clock=clock, max_batch_tokens=8), clock=clock, policy=policy)
    core.add(request("a", list(range(20)), 2))
    found = [d for _ in range(5) for d in core.step() if d.service is not None]
    assert [d.service.predicted_ttft_s for d in found if d.service] == [7.0, 7.0], "as it was said in the first step"
    core.add(request("b", list(range(20)), 2, arrival_s=clock.now()))
    (policy.silent_of,) = core.scheduler.requests
    found = [d for _ in range(5) for d in core.step() if d.service is not None]
    assert all(0 < d.service.predicted_ttft_s < 1 for d in found if d.service)
