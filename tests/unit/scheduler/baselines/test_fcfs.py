"""First come, first served: what a step holds, in order, within its limits."""

import numpy as np
import pytest

from nexusengine.errors import ConfigError
from nexusengine.perf.registry import make_model
from nexusengine.scheduler.baselines.fcfs import FCFS
from nexusengine.scheduler.plan import Reason, StepPlan
from nexusengine.scheduler.registry import make_policy
from nexusengine.scheduler.view import EngineView, RequestColumns

SIZE = 16


def view(
    running: list[tuple[int, int]], waiting: list[int], *, free: int = 1000, batch: int = 512, seats: int = 64
) -> EngineView:
    """running: (known, computed) of each; waiting: known of each. Slots are numbered running first."""
    c = RequestColumns.empty(len(running) + len(waiting) + 1)
    for slot, (known, computed) in enumerate(running):
        c.known_tokens[slot], c.computed_tokens[slot], c.blocks[slot] = known, computed, -(-computed // SIZE)
    for slot, known in enumerate(waiting, len(running)):
        c.known_tokens[slot] = known
    slots = np.arange(len(running) + len(waiting), dtype=np.int32)
    total = free + int(c.blocks.sum())
    return EngineView(c, slots[: len(running)], slots[len(running) :], free, total, SIZE, batch, seats, make_model())


def computed(plan: StepPlan) -> dict[int, int]:
    return dict(zip(plan.slots.tolist(), plan.counts.tolist(), strict=True))


def test_decodes_come_first_and_prompts_share_what_is_left() -> None:
    plan = FCFS(budget=100).plan(view([(300, 40), (11, 10), (21, 20)], [50]), 0.0)
    assert plan.slots.tolist() == [1, 2, 0]
    assert computed(plan) == {1: 1, 2: 1, 0: 98}
    assert plan.reasons[3] == Reason.WAIT_TOKENS


def test_newcomers_are_admitted_in_order_until_one_does_not_fit() -> None:
    plan = FCFS().plan(view([], [100, 2000, 30], free=20), 0.0)
    assert computed(plan) == {0: 100}
    assert plan.reasons[1] == plan.reasons[2] == Reason.WAIT_BLOCKS


def test_only_so_many_run_as_there_are_seats() -> None:
    plan = FCFS().plan(view([(11, 10)], [10, 10], seats=2), 0.0)
    assert computed(plan) == {0: 1, 1: 10}
    assert plan.reasons[2] == Reason.WAIT_RUNNING_SLOT


def test_the_newest_gives_way_when_a_decode_lacks_a_block() -> None:
    plan = FCFS().plan(view([(17, 16), (33, 32)], [10], free=1), 0.0)
    assert plan.preempt == (1,)
    assert computed(plan) == {0: 1}


def test_half_computed_prompts_that_fill_the_cache_do_not_block_each_other() -> None:
    plan = FCFS().plan(view([(200, 64), (200, 64)], [], free=0), 0.0)
    assert plan.preempt == (1,)
    assert computed(plan) == {0: 64}


def test_a_newcomer_does_not_take_the_blocks_a_running_prompt_still_needs() -> None:
    plan = FCFS(budget=32).plan(view([(320, 64)], [64], free=18, batch=512), 0.0)
    assert computed(plan) == {0: 32}
    assert 1 not in computed(plan)


def test_a_cached_prefix_is_not_computed_again() -> None:
    v = view([], [100])
    v.columns.cached_tokens[0], v.columns.cached_free_blocks[0] = 64, 4
    plan = FCFS().plan(v, 0.0)
    assert computed(plan) == {0: 36}
    assert plan.predicted_s > 0


def test_a_policy_is_made_by_name_with_options() -> None:
    policy = make_policy("fcfs:budget=64")
    assert isinstance(policy, FCFS)
    assert policy.budget == 64
    for spec, word in [
        ("fsfc", "fsfc"),
        ("fcfs:size=3", "size"),
        ("fcfs:budget=x", "budget=x"),
        ("fcfs:budget=0", "0"),
    ]:
        with pytest.raises(ConfigError, match=word):
            make_policy(spec)
