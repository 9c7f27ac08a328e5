"""What a core remembers of its steps and requests."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
import pytest

from nexusengine.clock import VirtualClock
from nexusengine.core.engine_core import EngineCore
from nexusengine.core.history import History, record_of
from nexusengine.core.request import RequestState
from nexusengine.scheduler.baselines.fcfs import FCFS
from nexusengine.scheduler.plan import Reason, StepPlan
from nexusengine.scheduler.view import EngineView
from nexusengine.types import SLO, Service
from nexusengine.wire import MAX_CHANGES_IN_REPLY, MAX_STEPS_IN_REPLY, DebugQuery, RequestChange
from tests.support.fakes import FakeExecutor, make_core, request, run

NOBODY = np.zeros(0, np.int32)


def reasons(**by_slot: Reason) -> np.ndarray:
    found = np.zeros(4, np.int8)
    for name, reason in by_slot.items():
        found[int(name[1:])] = reason
    return found


def slots(*numbers: int) -> np.ndarray:
    return np.array(numbers, np.int32)


def end(history: History, slot: int, serial: int, request_id: str) -> None:
    state = RequestState.of(request(request_id, [1]), 1)
    state.slot, state.serial = slot, serial
    history.ended(slot, serial, record_of(state, Service("w0", 0.0), 9.0, "length"))


def test_only_changes_and_chunks_are_kept() -> None:
    history = History(4)
    serial = history.arrived(2)
    for step, (reason, count) in enumerate(
        [
            (Reason.WAIT_RUNNING_SLOT, 0),
            (Reason.WAIT_RUNNING_SLOT, 0),
            (Reason.ADMITTED, 8),
            (Reason.PREFILL, 8),
            (Reason.PREFILL, 5),
            (Reason.DECODE, 1),
            (Reason.DECODE, 1),
            (Reason.PREEMPTED, 0),
        ]
    ):
        computing = slots(2) if count else NOBODY
        history.planned(step, 0.1 * step, reasons(s2=reason), computing, slots(count) if count else NOBODY)
    assert [(c.step, c.reason, c.tokens) for c in history.changes(serial)] == [
        (0, "wait_running_slot", 0),
        (2, "admitted", 8),
        (3, "prefill", 8),
        (4, "prefill", 5),
        (5, "decode", 1),
        (7, "preempted", 0),
    ]
    assert history.changes(serial)[1] == RequestChange(0.2, 2, "admitted", 8)


def test_a_slot_that_is_used_again_tells_of_its_new_request_only() -> None:
    history = History(4)
    first = history.arrived(1)
    history.planned(0, 0.0, reasons(s1=Reason.DECODE), slots(1), slots(1))
    end(history, 1, first, "a")
    history.planned(1, 0.1, reasons(s1=Reason.DECODE), NOBODY, NOBODY)  # nobody is there
    second = history.arrived(1)
    history.planned(2, 0.2, reasons(s1=Reason.DECODE), slots(1), slots(1))
    assert [c.step for c in history.changes(first)] == [0]
    assert [c.step for c in history.changes(second)] == [2]
    known = history.ended_record("a")
    assert known is not None
    assert (known[0], known[1].finish_reason) == (first, "length")


def test_memory_is_bounded_and_the_oldest_is_forgotten() -> None:
    history = History(4, changes=10, records=3)
    serial = history.arrived(0)
    for step in range(25):
        reason = Reason.PREFILL if step % 2 else Reason.WAIT_TOKENS
        history.planned(step, float(step), reasons(s0=reason), NOBODY, NOBODY)
    assert [c.step for c in history.changes(serial)] == list(range(15, 25))
    for i in range(5):
        end(history, 1, history.arrived(1), f"r{i}")
    assert [history.ended_record(f"r{i}") is not None for i in range(5)] == [False, False, True, True, True]


def test_more_changes_in_one_step_than_there_is_room_for_keep_what_fits() -> None:
    history = History(4, changes=3)
    serials = [history.arrived(slot) for slot in range(4)]
    every = dict.fromkeys(("s0", "s1", "s2", "s3"), Reason.WAIT_RUNNING_SLOT)
    history.planned(0, 0.0, reasons(**every), NOBODY, NOBODY)
    assert [len(history.changes(s)) for s in serials] == [0, 1, 1, 1]


def served(**options: Any) -> EngineCore:
    clock = VirtualClock()
    return make_core(FakeExecutor(clock=clock, max_batch_tokens=8), clock=clock, name="w5", **options)


def test_the_story_of_a_request_can_be_asked_for_while_it_runs_and_afterwards() -> None:
    core = served(max_running=1)
    core.add(request("a", list(range(20)), 3, slo=SLO(2.0, 0.1), slo_class="gold"))
    core.add(request("b", [1, 2], 2))
    core.step()
    waiting = core.debug_reply(DebugQuery(1, request_id="b")).request
    assert waiting is not None
    record = waiting.record
    assert (record.finish_reason, record.timings.scheduled_s, record.slo_class) == (None, None, None)
    assert [c.reason for c in waiting.changes] == ["wait_running_slot"]
    run(core)
    answer = core.debug_reply(DebugQuery(7, request_id="a", client=b"c"))
    assert (answer.client, answer.query, answer.worker_id, answer.steps) == (b"c", 7, "w5", ())
    story = answer.request
    assert story is not None
    assert [(c.reason, c.tokens) for c in story.changes] == [
        ("admitted", 8),
        ("prefill", 8),
        ("prefill", 4),
        ("decode", 1),
    ]
    record = story.record
    assert (record.finish_reason, record.slo_class, record.slo) == ("length", "gold", SLO(2.0, 0.1))
    assert record.timings.output_tokens == 3
    assert record.timings.first_token_s == pytest.approx(0.03)
    assert [s.step for s in story.steps] == [c.step for c in story.changes] == [1, 2, 3, 4]
    assert core.debug_reply(DebugQuery(1, request_id="nobody")).request is None


def test_recent_steps_say_what_was_planned_and_what_came_of_it() -> None:
    core = served()
    core.add(request("a", list(range(20)), 40))
    run(core)
    steps = core.debug_reply(DebugQuery(1, last_steps=3)).steps
    assert [s.step for s in steps] == [core.stats().steps - 2, core.stats().steps - 1, core.stats().steps]
    assert steps[-1].reasons == {"decode": 1}
    assert steps[-1].tokens == steps[-1].sequences == 1
    assert steps[-1].device_s == 0.01
    assert 0 < steps[-1].predicted_s <= steps[-1].upper_s


class Alternating(FCFS):
    """Gives another reason in every second step."""

    def __init__(self) -> None:
        super().__init__()
        self._steps = 0

    def plan(self, view: EngineView, now: float) -> StepPlan:
        plan, self._steps = super().plan(view, now), self._steps + 1
        reason = Reason.DECODE if self._steps % 2 else Reason.BACKFILL
        return replace(plan, reasons=np.full_like(plan.reasons, reason))


def test_an_answer_has_bounds_whatever_is_asked_for() -> None:
    clock, tokens = VirtualClock(), MAX_CHANGES_IN_REPLY + 100
    device = FakeExecutor(clock=clock, num_blocks=512, max_model_len=2048)
    core = make_core(device, clock=clock, policy=Alternating(), check_every_step=False)
    core.add(request("a", [1, 2, 3], tokens))
    while core.stats().steps < tokens - 1:
        core.step()
    answer = core.debug_reply(DebugQuery(1, last_steps=10**9, request_id="a"))
    assert len(answer.steps) == MAX_STEPS_IN_REPLY
    assert answer.request is not None
    assert len(answer.request.changes) == MAX_CHANGES_IN_REPLY
    assert 0 < len(answer.request.steps) <= MAX_STEPS_IN_REPLY
