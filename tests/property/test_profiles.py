"""Any batch has a finite, positive duration on every profile, and takes no less than its parts."""

import numpy as np
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from nexusengine.profiles.registry import list_profiles, load_profile

NAMES = [info.identity.name for info in list_profiles()]
ROWS = st.lists(st.tuples(st.integers(1, 9000) | st.just(1), st.integers(0, 131_072)), min_size=1, max_size=300)


@settings(max_examples=60, deadline=None)
@given(rows=ROWS, name=st.sampled_from(NAMES))
def test_every_batch_takes_a_finite_time(rows: list[tuple[int, int]], name: str) -> None:
    counts, contexts = (np.array(column, np.int32) for column in zip(*rows, strict=True))
    seconds = load_profile(name).step_s(counts, contexts)
    assert np.isfinite(seconds)
    assert 1e-4 < seconds < 1e6


@settings(max_examples=100, deadline=None)
@given(
    chunk=st.tuples(st.integers(2, 9000), st.integers(0, 131_072)),
    contexts=st.lists(st.integers(0, 100_000), min_size=1, max_size=64),
    name=st.sampled_from(NAMES),
)
@example(chunk=(512, 64_000), contexts=[52_000], name="rtxpro6000/llama-3.1-8b")
@example(chunk=(512, 64_000), contexts=[64_000, 64_000], name="rtx4090/llama-3.1-8b")
def test_a_mixed_step_takes_no_less_than_its_decodes_or_its_chunk_alone(
    chunk: tuple[int, int], contexts: list[int], name: str
) -> None:
    step_s = load_profile(name).step_s
    decodes = np.ones(len(contexts), np.int32), np.array(contexts, np.int32)
    prompt = np.array([chunk[0]], np.int32), np.array([chunk[1]], np.int32)
    both_s = step_s(*(np.append(a, b) for a, b in zip(decodes, prompt, strict=True)))
    assert both_s > 0.8 * max(step_s(*decodes), step_s(*prompt))  # kernels for few tokens can take longer than for more


@settings(max_examples=40, deadline=None)
@given(
    contexts=st.lists(st.integers(0, 100_000), min_size=1, max_size=300),
    steps=st.integers(1, 300),
    name=st.sampled_from(NAMES),
)
def test_a_run_of_decodes_is_its_steps(contexts: list[int], steps: int, name: str) -> None:
    profile, rows = load_profile(name), np.array(contexts, np.int32)
    run = profile.decode_run_s(rows, steps)
    last = profile.step_s(np.ones(len(rows), np.int32), rows + np.int32(steps - 1))
    assert run[-1] == pytest.approx(last, rel=1e-9)


@settings(max_examples=40, deadline=None)
@given(rows=ROWS, name=st.sampled_from(NAMES), seed=st.integers(0, 2**32 - 1))
def test_rows_may_come_in_any_order(rows: list[tuple[int, int]], name: str, seed: int) -> None:
    counts, contexts = (np.array(column, np.int32) for column in zip(*rows, strict=True))
    order = np.random.default_rng(seed).permutation(len(rows))
    profile = load_profile(name)
    assert profile.step_s(counts[order], contexts[order]) == pytest.approx(profile.step_s(counts, contexts), rel=1e-9)
