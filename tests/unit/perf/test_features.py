"""The features of a step, from its rows."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from nexusengine.perf.features import StepFeatures

rows_ = st.lists(st.tuples(st.sampled_from([1, 1, 1, 2, 16, 700]), st.integers(0, 100_000)), max_size=40)


@given(rows=rows_)
def test_features_are_sums_over_rows_of_prompts_and_of_decodes(rows: list[tuple[int, int]]) -> None:
    counts, contexts = (np.array([row[i] for row in rows], np.int32) for i in (0, 1))
    f = StepFeatures.of(counts, contexts)
    chunks = [(q, ctx) for q, ctx in rows if q > 1]
    assert (f.tokens, f.sequences, f.prefills) == (sum(q for q, _ in rows), len(rows), len(chunks))
    assert f.prefill_attention == pytest.approx(sum(q * (ctx + q / 2) for q, ctx in chunks))
    assert f.decode_kv_tokens == sum(ctx + 1 for q, ctx in rows if q == 1)
    assert all(type(n) is int for n in (f.tokens, f.sequences, f.prefills, f.decode_kv_tokens))
