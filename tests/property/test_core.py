"""The engine core under random requests, aborts, chunk sizes and tiny caches: the answers never depend on it."""

from __future__ import annotations

from hypothesis import given, settings
from hypothesis import strategies as st

from nexusengine.lens.fcfs import FCFS
from tests.fakes import FakeExecutor, continuation, make_core, request

prompts = st.lists(st.integers(0, 3), min_size=1, max_size=24)
arrivals = st.lists(
    st.tuples(st.integers(0, 30), prompts, st.integers(1, 12), st.one_of(st.none(), st.integers(0, 40))),
    min_size=1,
    max_size=14,
)


@settings(max_examples=150, deadline=None)
@given(
    arrivals=arrivals,
    budget=st.integers(1, 40),
    blocks=st.integers(10, 30),
    block_size=st.sampled_from([1, 4, 16]),
    seats=st.integers(1, 6),
    caching=st.booleans(),
)
def test_answers_do_not_depend_on_the_schedule_and_nothing_leaks(
    arrivals: list[tuple[int, list[int], int, int | None]],
    budget: int,
    blocks: int,
    block_size: int,
    seats: int,
    caching: bool,
) -> None:
    executor = FakeExecutor(
        num_blocks=max(blocks, 36 // block_size + 2), block_size=block_size, max_model_len=36, max_batch_tokens=40
    )
    core = make_core(executor, policy=FCFS(budget), max_running=seats, prefix_caching=caching)
    tokens: dict[str, list[int]] = {}
    ended: dict[str, str] = {}
    for step in range(4000):
        for i, (when, prompt, length, _) in enumerate(arrivals):
            if when == step:
                core.add(request(str(i), prompt, length))
                tokens[str(i)] = []
        for i, (_, _, _, abort_at) in enumerate(arrivals):
            if abort_at == step and (delta := core.abort(str(i))) is not None:
                ended[str(i)] = delta.finish_reason or ""
        for delta in core.step():
            assert delta.request_id not in ended, "news after the end"
            tokens[delta.request_id] += delta.token_ids
            if delta.finish_reason is not None:
                ended[delta.request_id] = delta.finish_reason
        if step > 30 and not core.has_work:
            break
    assert set(ended) == {str(i) for i in range(len(arrivals))}
    for i, (_, prompt, length, _) in enumerate(arrivals):
        expected = continuation(prompt, length)
        if ended[str(i)] == "length":
            assert tokens[str(i)] == expected
        else:
            assert tokens[str(i)] == expected[: len(tokens[str(i)])]
    stats = core.stats()
    assert (stats.running, stats.waiting, stats.kv_used_blocks) == (0, 0, 0)
