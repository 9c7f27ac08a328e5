"""A bound on the whole response sets the time that a step may take for each of its tokens."""

import numpy as np
import pytest

from tests.support.lens_views import NAN, Bench, deadlines_of


def tpot_s(e2e_s: float, expected: float, generated: int = 10, decode_s: float = 0.01) -> float:
    """Of a response whose first token came 1 s after its arrival, with a promise of 50 ms a token."""
    bench = Bench()
    slot = bench.decode(first_s=1.0, generated=generated)
    bench.c.e2e_s[slot], bench.c.expected_tokens[slot] = e2e_s, expected
    view = bench.view()
    deadlines = deadlines_of(view)
    deadlines.renew_e2e(view, np.array([slot], np.int32), decode_s)
    return float(deadlines.tpot_s[slot])


def test_the_rest_of_the_bound_is_spread_over_the_tokens_expected() -> None:
    assert tpot_s(e2e_s=3.0, expected=101) == pytest.approx(0.02)


def test_a_loose_bound_leaves_the_promised_time_per_token() -> None:
    assert tpot_s(e2e_s=60.0, expected=101) == 0.05
    assert tpot_s(e2e_s=NAN, expected=101) == 0.05


def test_while_nothing_is_known_of_lengths_it_may_end_with_this_token() -> None:
    assert tpot_s(e2e_s=1.4, expected=NAN, generated=20) == pytest.approx(0.02)


def test_a_bound_that_is_out_of_reach_holds_nobody_up() -> None:
    assert tpot_s(e2e_s=3.0, expected=101, decode_s=0.019) == 0.05


def test_the_first_token_is_due_within_the_whole_response() -> None:
    bench = Bench()
    slot = bench.wait(100, ttft_s=5.0)
    bench.c.e2e_s[slot] = 2.0
    assert deadlines_of(bench.view()).first_due_s[slot] == 2.0
