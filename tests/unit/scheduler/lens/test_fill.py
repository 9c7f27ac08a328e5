"""The largest chunk of a prompt that fits the step limit."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from nexusengine.perf.features import StepFeatures
from nexusengine.scheduler.lens.fill import largest_chunk
from tests.support.lens_views import Straight


@given(
    limit_ms=st.floats(1, 200),
    rows=st.integers(0, 200),
    context=st.integers(0, 10_000),
    most=st.integers(1, 8192),
)
def test_a_chunk_fits_its_limit_and_leaves_little_of_it(limit_ms: float, rows: int, context: int, most: int) -> None:
    model, base, limit_s = Straight(), StepFeatures(rows, rows, 0, 0.0, rows * 500), limit_ms / 1000
    count = largest_chunk(model, limit_s, base, context, most)

    def step_s(q: int) -> float:
        pairs = q * (context + 0.5 * q)
        return 0.005 + 20e-6 * (rows + q) + 40e-9 * rows * 500 + (0.004 + 1e-9 * pairs if q > 1 else 0.0)

    assert 0 <= count <= most
    if count > 1:
        assert step_s(count) <= limit_s + 1e-9
    if 1 < count < most:
        assert step_s(count + 1) > limit_s or step_s(count) >= 0.979 * limit_s
