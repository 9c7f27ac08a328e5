"""When each prompt of a queue has its first token, against steps that are counted out one by one."""

from __future__ import annotations

from dataclasses import replace

import msgspec
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from nexusengine.forecast.backlog import Prompts, first_tokens_in_s
from nexusengine.forecast.speed import predict_speed, predictor_of
from nexusengine.perf import basis
from nexusengine.perf.curve import Curve
from nexusengine.perf.features import StepFeatures
from nexusengine.router.placement.forecast_matrix import ForecastMatrix
from nexusengine.router.placement.prism import assess
from nexusengine.scheduler.baselines.fcfs import FCFS
from nexusengine.wire import PolicyTraits
from tests.support.router_fakes import load, pending, request, view

WEIGHTS = {basis.ONE: 0.01, basis.SLOPE: 0.02, basis.ATTENTION: 0.005, basis.KV: 0.003}
MODEL = Curve([WEIGHTS.get(i, 0.0) for i in range(basis.TERMS)], seen=1e6)
LIMIT, INF = 512, float("inf")
FCFS_TRAITS = FCFS().traits


def by_steps(prompts: list[tuple[int, int]], decodes: list[int]) -> list[float]:
    """When each of the prompts (tokens in the KV cache, tokens to compute), served one after the other, is done."""
    time_s, done_at, state = 0.0, [0.0] * len(prompts), [list(p) for p in prompts]
    while any(left for _, left in state):
        room, counts, contexts, ended = LIMIT - len(decodes), [1] * len(decodes), list(decodes), []
        for i, (done, left) in enumerate(state):
            taken = min(room, left)
            if taken:
                counts.append(taken)
                contexts.append(done)
                room -= taken
                state[i] = [done + taken, left - taken]
                ended += [i] * (taken == left)
        time_s += MODEL.predict(StepFeatures.of(np.array(counts, np.int32), np.array(contexts, np.int32))).mean_s
        for i in ended:
            done_at[i] = time_s
    return done_at


def foretold(
    prompts: list[tuple[int, int]],
    decodes: list[int],
    traits: PolicyTraits = FCFS_TRAITS,
    due_s: list[float] | None = None,
    relegated: list[bool] | None = None,
) -> list[float]:
    done, left = np.array(prompts, np.float64).T
    kv_tokens = float(sum(decodes) + len(decodes))
    speed = predict_speed(MODEL, 1.0, len(decodes), kv_tokens, INF, LIMIT, traits)
    due = np.array(due_s or [INF] * len(prompts))
    last = np.array(relegated or [False] * len(prompts))
    in_s: list[float] = first_tokens_in_s(Prompts(due, left, done), last, speed, traits, 0.0, 0.0).tolist()
    return in_s


@pytest.mark.parametrize(
    ("prompts", "decodes"),
    [
        ([(0, 200)], []),
        ([(0, 3000)], []),
        ([(512, 1536), (0, 700), (0, 300), (0, 1500)], [100, 900, 30]),
        ([(0, 100)] * 20 + [(0, 10)], [50] * 64),
        ([(0, 20), (0, 40), (0, 60)], []),
    ],
)
def test_first_tokens_come_at_the_ends_of_the_steps_that_complete_their_prompts(
    prompts: list[tuple[int, int]], decodes: list[int]
) -> None:
    assert foretold(prompts, decodes) == pytest.approx(by_steps(prompts, decodes), rel=0.04)


def test_those_with_earlier_deadlines_go_first_and_those_who_would_be_late_after_all_others() -> None:
    traits = PolicyTraits(order="deadline", relegates=True, step_s=INF)
    times = foretold([(0, 600), (0, 600), (0, 600)], [], traits, [9.0, 5.0, 0.01])
    assert sorted(times) == [times[1], times[0], times[2]]
    patient = replace_relegates(traits)
    times = foretold([(0, 600), (0, 600), (0, 600)], [], patient, [9.0, 5.0, 0.01])
    assert sorted(times) == [times[2], times[1], times[0]]


def replace_relegates(traits: PolicyTraits) -> PolicyTraits:
    return msgspec.structs.replace(traits, relegates=False)


def test_who_was_relegated_comes_last_in_the_order_given() -> None:
    times = foretold([(0, 600)] * 4, [], relegated=[True, False, True, False])
    assert sorted(times) == [times[1], times[3], times[0], times[2]]


PROMPT = st.tuples(st.floats(0.0, 1e4) | st.just(INF), st.integers(1, 100_000), st.integers(0, 100_000), st.booleans())
ANY_TRAITS = st.builds(
    PolicyTraits,
    order=st.sampled_from(["deadline", "arrival", "shortest"]),
    relegates=st.booleans(),
    step_tokens=st.integers(0, 4096),
    step_s=st.floats(1e-6, 1e3) | st.just(INF),
    by_tpot=st.booleans(),
)


@given(
    st.lists(PROMPT, min_size=1, max_size=30),
    ANY_TRAITS,
    st.integers(0, 300),
    st.floats(1e-4, 10.0) | st.just(INF),
    st.integers(1, 4096),
    st.booleans(),
)
def test_whatever_waits_each_prompt_has_a_time_that_is_possible(
    prompts: list[tuple[float, int, int, bool]],
    traits: PolicyTraits,
    decodes: int,
    tpot_s: float,
    limit: int,
    unfitted: bool,
) -> None:
    """Finite, after the step under way, and the last not before all that waits is computed at the best rate."""
    due_s, left, done = (np.array(x, np.float64) for x in list(zip(*prompts, strict=True))[:3])
    model = predictor_of(None) if unfitted else MODEL
    speed = predict_speed(model, 1.2, decodes, 100.0 * decodes, tpot_s, limit, traits)
    relegated = np.array([p[3] for p in prompts])
    in_s = first_tokens_in_s(Prompts(due_s, left, done), relegated, speed, traits, 0.5, 100.0)
    assert np.isfinite(in_s).all()
    assert (in_s > 0.5).all()
    assert in_s.max() >= 0.5 + 0.999 * float(speed.service_s(left, done).sum() - speed.first_step_s)


def test_nothing_is_foretold_where_nothing_waits() -> None:
    speed = predict_speed(MODEL, 1.0, 0, 0.0, INF, LIMIT, FCFS_TRAITS)
    nobody = Prompts(np.zeros(0), np.zeros(0), np.zeros(0))
    assert len(first_tokens_in_s(nobody, np.zeros(0, np.bool_), speed, FCFS_TRAITS, 1.0, 0.0)) == 0


@pytest.mark.parametrize("traits", [FCFS_TRAITS, PolicyTraits(step_s=INF)])
def test_the_router_and_the_worker_say_the_same_when_they_know_the_same(traits: PolicyTraits) -> None:
    """PRISM's own figure for a new request, and the worker's once that request is the last in its queue."""
    reported = load(pending=(pending(0.4, 900), pending(0.9, 300)))
    worker = view("w", reported)
    worker = replace(worker, info=msgspec.structs.replace(worker.info, traits=traits))
    matrix = ForecastMatrix()
    matrix.update([worker], 0.0)
    new = request(prompt=700, slo=None)
    of_router = float(assess(matrix, new, 0.0).first_token_s[0])
    e = matrix.estimates
    prompts = Prompts(np.array([0.4, 0.9, INF]), np.array([900.0, 300.0, 700.0]), np.zeros(3))
    speed = matrix._snapshots[0].speed  # type: ignore[union-attr]
    rest_s = float(e.rest_s[0])
    of_worker = first_tokens_in_s(prompts, np.zeros(3, np.bool_), speed, traits, rest_s, worker.reported_s)
    assert of_router == pytest.approx(float(of_worker[2]), rel=0.005)  # the router counts attention into full steps


def test_where_a_step_takes_the_same_whatever_it_holds_nothing_becomes_infinitely_slow() -> None:
    """A model that has seen few steps may think so; what pairs cost was then multiplied by a hundred million."""
    flat = Curve([{basis.ONE: 0.1, basis.ATTENTION: 0.005}.get(i, 0.0) for i in range(basis.TERMS)], seen=64)
    for traits in (PolicyTraits(step_s=0.05), PolicyTraits(step_s=0.12), FCFS_TRAITS):
        speed = predict_speed(flat, 1.2, 1, 100.0, 0.05, 64, traits)
        assert speed.per_pair_s <= 10 * 0.005 / basis.PAIRS
        assert float(speed.service_s(np.array([600.0]), np.zeros(1))[0]) < 600 / 16 * 0.11
