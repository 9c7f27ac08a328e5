"""vLLM's policy: what is in a step, who is admitted, who gives way."""

import numpy as np
import pytest

from nexusengine.errors import ConfigError
from nexusengine.scheduler.baselines.vllm import Vllm
from nexusengine.scheduler.plan import Reason
from nexusengine.scheduler.registry import make_policy
from tests.unit.scheduler.baselines.test_fcfs import computed, view


def test_decodes_then_the_prompt_that_has_begun_then_newcomers_share_the_budget() -> None:
    plan = Vllm(budget=100).plan(view([(11, 10), (60, 20)], [30, 500, 10]), 0.0)
    assert computed(plan) == {0: 1, 1: 40, 2: 30, 3: 29}
    assert plan.reasons[4] == Reason.WAIT_TOKENS


def test_a_newcomer_is_admitted_only_if_its_whole_prompt_finds_blocks() -> None:
    held = view([], [400], free=10, batch=64)
    assert computed(Vllm(reserve_full=0).plan(held, 0.0)) == {0: 64}
    waits = Vllm().plan(view([(17, 16)], [400], free=10, batch=64), 0.0)
    assert computed(waits) == {0: 1}
    assert waits.reasons[1] == Reason.WAIT_BLOCKS


def test_no_blocks_are_kept_back_for_decodes_to_grow_into() -> None:
    running = [(12, 11)] * 4
    assert computed(Vllm().plan(view(running, [32], free=2), 0.0)) == {0: 1, 1: 1, 2: 1, 3: 1, 4: 32}


def test_the_request_admitted_last_gives_way_and_nobody_is_admitted_then() -> None:
    plan = Vllm().plan(view([(17, 16), (33, 32)], [10], free=1), 0.0)
    assert plan.preempt == (1,)
    assert computed(plan) == {0: 1}
    assert len(plan.slots) == 1


def test_chunks_can_be_limited() -> None:
    plan = Vllm(longest_chunk=16).plan(view([(60, 20)], [30]), 0.0)
    assert computed(plan) == {0: 16, 1: 16}


def test_prompts_that_fill_the_cache_do_not_block_each_other() -> None:
    plan = Vllm().plan(view([(200, 64), (200, 64)], [], free=0), 0.0)
    assert plan.preempt == (1,)
    assert computed(plan) == {0: 64}


def test_it_has_a_name_and_options() -> None:
    policy = make_policy("vllm:budget=2048,reserve_full=0")
    assert (policy.name, policy.budget, policy.reserve_full) == ("vllm", 2048, False)  # type: ignore[attr-defined]
    with pytest.raises(ConfigError, match="budget"):
        make_policy("vllm:budget=0.5")
    with pytest.raises(ConfigError, match="longest_chunk"):
        make_policy("vllm:longest_chunk=-1")


def test_its_plans_hold_every_row_once() -> None:
    plan = Vllm().plan(view([(11, 10)] * 30, [100] * 30), 0.0)
    assert len(np.unique(plan.slots)) == len(plan.slots)
