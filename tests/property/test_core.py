"""The engine core under random requests, aborts, plans and tiny caches: the answers never depend on any of it."""

from __future__ import annotations

import random
from dataclasses import dataclass

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from nexusengine.core.engine_core import EngineCore
from nexusengine.scheduler.baselines.fcfs import FCFS
from nexusengine.scheduler.plan import StepPlan
from nexusengine.scheduler.view import EngineView
from nexusengine.types import SamplingParams
from nexusengine.wire import PolicyTraits
from tests.support.fakes import FakeExecutor, make_core, next_token, request

POISON = 96
MAX_MODEL_LEN = 36


@dataclass(frozen=True)
class Arrival:
    """at, abort_at: steps. ends: ids below this are stop tokens."""

    at: int
    prompt: tuple[int, ...]
    length: int
    ends: int
    abort_at: int | None

    def oracle(self) -> tuple[list[int], str]:
        """The output, and how it ends, whatever else happens in the engine."""
        tokens = list(self.prompt)
        while POISON not in tokens:
            token = next_token(tokens)
            if token < self.ends:
                return tokens[len(self.prompt) :], "stop"
            tokens.append(token)
            if len(tokens) == len(self.prompt) + self.length:
                return tokens[len(self.prompt) :], "length"
        return tokens[len(self.prompt) :], "error"

    def add_to(self, core: EngineCore, name: str) -> None:
        sampling = SamplingParams(
            temperature=0.0, seed=0, max_tokens=self.length, stop_token_ids=tuple(range(self.ends))
        )
        core.add(request(name, list(self.prompt), sampling=sampling))


class Reckless:
    """Any plan that keeps the contract, but for KV blocks: it plans as if there were always enough of them."""

    name = "reckless"
    traits = PolicyTraits()

    def __init__(self, seed: int) -> None:
        self.rng = random.Random(seed)

    def plan(self, view: EngineView, now: float) -> StepPlan:
        c, rng = view.columns, self.rng
        running, waiting = view.running.tolist(), view.waiting.tolist()
        preempt = [s for s in running if rng.random() < 0.03]
        seats = view.max_running - len(running) + len(preempt)
        candidates = [s for s in running + waiting if s not in preempt]
        refuse = [candidates.pop()] if len(candidates) > 1 and rng.random() < 0.01 else []
        rng.shuffle(candidates)
        rows: dict[int, int] = {}
        budget = view.max_batch_tokens
        for slot in candidates:
            if (rows and rng.random() < 0.3) or budget == 0 or (slot in waiting and seats == 0):
                continue
            seats -= slot in waiting
            rows[slot] = rng.randint(1, min(int(c.known_tokens[slot] - c.computed_tokens[slot]), budget))
            budget -= rows[slot]
        return StepPlan(
            np.array(list(rows), np.int32),
            np.array(list(rows.values()), np.int32),
            0.01,
            0.02,
            np.zeros(len(c.known_tokens), np.int8),
            preempt=tuple(preempt),
            refuse=tuple(refuse),
            relegate=tuple(candidates[:1]),
        )


def serve(core: EngineCore, arrivals: list[Arrival]) -> None:
    """Run to the end; every answer must be the oracle's, or a beginning of it where it was cut short."""
    tokens: dict[str, list[int]] = {}
    ended: dict[str, tuple[str, str | None]] = {}
    for step in range(4000):
        for i, arrival in enumerate(arrivals):
            if arrival.at == step:
                arrival.add_to(core, str(i))
                tokens[str(i)] = []
            if arrival.abort_at == step and (delta := core.abort(str(i))) is not None:
                ended[str(i)] = ("abort", None)
        for delta in core.step():
            assert delta.request_id not in ended, "news after the end"
            tokens[delta.request_id] += delta.token_ids
            if delta.finish_reason is not None:
                ended[delta.request_id] = (delta.finish_reason, delta.error_code)
        if step > 30 and not core.has_work:
            break
    assert set(ended) == {str(i) for i in range(len(arrivals))}
    for i, arrival in enumerate(arrivals):
        expected, reason = arrival.oracle()
        if ended[str(i)][0] == "abort" or ended[str(i)][1] == "overloaded":
            assert tokens[str(i)] == expected[: len(tokens[str(i)])]
        else:
            assert (tokens[str(i)], ended[str(i)][0]) == (expected, reason)
    stats = core.stats()
    assert (stats.running, stats.waiting, stats.kv_used_blocks) == (0, 0, 0)
    assert stats.requests == len(arrivals)
    assert stats.finished_stop + stats.finished_length + stats.finished_abort + stats.finished_error == len(arrivals)


arrivals_ = st.lists(
    st.builds(
        Arrival,
        at=st.integers(0, 30),
        prompt=st.lists(st.integers(0, 3), min_size=1, max_size=24).map(tuple),
        length=st.integers(1, 12),
        ends=st.sampled_from([0, 0, 8]),
        abort_at=st.one_of(st.none(), st.integers(0, 40)),
    ),
    min_size=1,
    max_size=14,
)


def tiny_executor(blocks: int, block_size: int, overlaps: bool = False) -> FakeExecutor:
    """One sequence of the longest kind always fits."""
    return FakeExecutor(
        num_blocks=max(blocks, MAX_MODEL_LEN // block_size + 2),
        block_size=block_size,
        max_model_len=MAX_MODEL_LEN,
        max_batch_tokens=40,
        poison=frozenset({POISON}),
        overlaps=overlaps,
    )


@settings(max_examples=100, deadline=None)
@given(
    arrivals=arrivals_,
    budget=st.integers(1, 40),
    blocks=st.integers(10, 30),
    block_size=st.sampled_from([1, 4, 16]),
    seats=st.integers(1, 6),
    caching=st.booleans(),
    overlaps=st.booleans(),
)
def test_answers_do_not_depend_on_the_schedule_and_nothing_leaks(
    arrivals: list[Arrival], budget: int, blocks: int, block_size: int, seats: int, caching: bool, overlaps: bool
) -> None:
    executor = tiny_executor(blocks, block_size, overlaps)
    serve(make_core(executor, policy=FCFS(budget), max_running=seats, prefix_caching=caching), arrivals)


@settings(max_examples=100, deadline=None)
@given(
    arrivals=arrivals_,
    seed=st.integers(0, 2**32),
    blocks=st.integers(10, 40),
    block_size=st.sampled_from([1, 4, 16]),
    seats=st.integers(1, 6),
    caching=st.booleans(),
    overlaps=st.booleans(),
)
def test_answers_survive_a_policy_that_plans_blocks_there_are_not(
    arrivals: list[Arrival], seed: int, blocks: int, block_size: int, seats: int, caching: bool, overlaps: bool
) -> None:
    executor = tiny_executor(blocks, block_size, overlaps)
    serve(make_core(executor, policy=Reckless(seed), max_running=seats, prefix_caching=caching), arrivals)


@pytest.mark.parametrize("overlaps", [False, True])
def test_the_random_plans_do_run_out_of_blocks_and_preempt(overlaps: bool) -> None:
    arrivals = [Arrival(i // 3, tuple([i % 4] * 20), 12, 0, None) for i in range(14)]
    core = make_core(tiny_executor(10, 4, overlaps), policy=Reckless(1), max_running=6)
    serve(core, arrivals)
    stats = core.stats()
    assert min(stats.plan_shortfalls, stats.preemptions, stats.kv_evictions, stats.cached_tokens) > 0
