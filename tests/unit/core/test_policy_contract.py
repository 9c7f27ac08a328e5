"""What the core does with policies that refuse, fail, or break their contract."""

import numpy as np
import pytest

from nexusengine.clock import VirtualClock
from nexusengine.errors import InternalError
from nexusengine.scheduler.baselines.fcfs import FCFS
from nexusengine.scheduler.plan import StepPlan
from nexusengine.scheduler.view import EngineView
from nexusengine.wire import PolicyTraits
from tests.support.fakes import make_core, request, run

PROMPT = list(range(1, 20))


class Scripted(FCFS):
    """FCFS that refuses and relegates what it is told to, and fails on demand."""

    def __init__(self) -> None:
        super().__init__()
        self.refuse: tuple[int, ...] = ()
        self.relegate: tuple[int, ...] = ()
        self.broken = False

    def plan(self, view: EngineView, now: float) -> StepPlan:
        if self.broken:
            raise ZeroDivisionError("oops")
        if not (self.refuse or self.relegate):
            return super().plan(view, now)
        none, refuse, relegate = np.zeros(0, np.int32), self.refuse, self.relegate
        self.refuse = self.relegate = ()
        reasons = np.zeros(len(view.columns.known_tokens), np.int8)
        return StepPlan(none, none, 0.1, 0.1, reasons, refuse=refuse, relegate=relegate)


def test_a_refused_request_ends_with_a_time_to_come_back_and_the_others_go_on() -> None:
    policy = Scripted()
    core = make_core(policy=policy)
    for name in ("refused", "relegated", "running"):
        core.add(request(name, [len(name), *PROMPT], 2))
    slots = {s.request.request_id: slot for slot, s in core.scheduler.requests.items()}
    policy.refuse, policy.relegate = (slots["refused"],), (slots["relegated"],)
    first = core.step()
    assert [(d.error_code, (d.retry_after_s or 0) >= 1.0) for d in first if d.finish_reason] == [("overloaded", True)]
    assert core.scheduler.columns.relegated.nonzero()[0].tolist() == [slots["relegated"]]
    assert set(run(core)) == {"relegated", "running"}


def test_refusing_everybody_is_a_step_too() -> None:
    policy = Scripted()
    core = make_core(policy=policy)
    core.add(request("a", PROMPT))
    policy.refuse = tuple(core.scheduler.requests)
    assert [d.error_code for d in core.step()] == ["overloaded"]
    assert not core.has_work


def test_a_policy_that_fails_is_named_and_no_end_is_lost() -> None:
    clock, policy = VirtualClock(), Scripted()
    core = make_core(policy=policy, clock=clock)
    core.add(request("late", PROMPT, deadline_s=1.0))
    core.add(request("other", PROMPT))
    policy.broken = True
    clock.advance(2.0)
    with pytest.raises(InternalError, match=r"'fcfs' failed: ZeroDivisionError\('oops'\)"):
        core.step()
    ends = core.fail_all("internal_error", "a step failed")
    assert [(d.request_id, d.error_code) for d in ends] == [("late", "deadline_exceeded"), ("other", "internal_error")]


class Wrong:
    """A policy that breaks its contract in a chosen way."""

    name = "wrong"
    traits = PolicyTraits()

    def __init__(
        self,
        slots: list[int],
        counts: list[int],
        preempt: tuple[int, ...] = (),
        refuse: tuple[int, ...] = (),
        predicted_s: float = 0.1,
    ) -> None:
        self.slots, self.counts, self.preempt = slots, counts, preempt
        self.refuse, self.predicted_s = refuse, predicted_s

    def plan(self, view: EngineView, now: float) -> StepPlan:
        return StepPlan(
            np.array(self.slots, np.int32),
            np.array(self.counts, np.int32),
            self.predicted_s,
            self.predicted_s,
            np.zeros(40, np.int8),
            preempt=self.preempt,
            refuse=self.refuse,
        )


@pytest.mark.parametrize(
    ("policy", "words"),
    [
        (Wrong([0, 0], [1, 1]), "twice"),
        (Wrong([0], [1, 1]), "1 slots have 2 counts"),
        (Wrong([-1], [1]), "without a request"),
        (Wrong([100], [1]), "without a request"),
        (Wrong([0], [1], refuse=(0,)), "twice"),
        (Wrong([0], [1], predicted_s=float("nan")), "nan"),
        (Wrong([5], [1]), "without a request"),
        (Wrong([0], [0]), "no token"),
        (Wrong([0], [99]), "more tokens than are known"),
        (Wrong([0, 1], [60, 60]), "120 tokens"),
        (Wrong([], [], preempt=(0,)), "preempts"),
        (Wrong([], []), "plans nothing"),
    ],
)
def test_a_plan_that_breaks_the_contract_is_named(policy: Wrong, words: str) -> None:
    core = make_core(policy=policy)
    core.add(request("a", [1] * 60, 2))
    core.add(request("b", [2] * 60, 2))
    with pytest.raises(InternalError, match=words):
        core.step()
