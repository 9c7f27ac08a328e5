"""The vocabulary refuses what makes no sense, naming the field."""

import math
from typing import Any

import pytest

from nexusengine.errors import ERROR_TABLE, InternalError, InvalidRequest, Overloaded, error_from_code
from nexusengine.types import SLO, SamplingParams, Timings


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("temperature", math.nan),
        ("temperature", math.inf),
        ("temperature", -0.1),
        ("temperature", "hot"),
        ("temperature", True),
        ("top_k", -1),
        ("top_k", 1.5),
        ("top_p", 0.0),
        ("top_p", 1.1),
        ("min_p", -0.1),
        ("seed", 2**64),
        ("max_tokens", 0),
        ("max_tokens", -5),
        ("logprobs", 21),
        ("stop", [""]),
        ("stop", ["x"] * 17),
        ("stop", 7),
        ("stop", ["a", "\udc00"]),
        ("stop_token_ids", [-1]),
        ("stop_token_ids", ["a"]),
    ],
)
def test_a_sampling_field_out_of_range_is_named(field: str, value: Any) -> None:
    with pytest.raises(InvalidRequest) as caught:
        SamplingParams(**{field: value})
    assert caught.value.param == field


def test_a_single_stop_string_is_one_stop_string() -> None:
    assert SamplingParams(stop="abc").stop == ("abc",)  # type: ignore[arg-type]


@pytest.mark.parametrize(("ttft_s", "tpot_s"), [(0, 1), (-1, 1), (1, math.nan), (math.inf, 1), (1, 1e9)])
def test_an_absurd_slo_is_refused(ttft_s: float, tpot_s: float) -> None:
    with pytest.raises(InvalidRequest):
        SLO(ttft_s, tpot_s)


def test_time_per_output_token_is_the_mean_after_the_first() -> None:
    timings = Timings(arrival_s=1.0, scheduled_s=1.5, first_token_s=2.0, finished_s=5.0, output_tokens=4)
    assert (timings.queue_s, timings.ttft_s, timings.tpot_s, timings.e2e_s) == (0.5, 1.0, 1.0, 4.0)
    assert Timings(1.0, 1.0, 2.0, 2.0, output_tokens=1).tpot_s is None


def test_errors_survive_a_process_boundary() -> None:
    error = error_from_code(Overloaded.code, "full", retry_after_s=2.0)
    assert isinstance(error, Overloaded)
    assert (error.message, error.retry_after_s, error.http_status) == ("full", 2.0, 429)
    assert isinstance(error_from_code("never heard of", "x"), InternalError)
    assert all(cls.code == code for code, cls in ERROR_TABLE.items())
