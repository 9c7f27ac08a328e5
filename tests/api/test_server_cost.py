"""The benchmark of what server and router add: that it runs; what it measures is not a test."""

from __future__ import annotations

from benchmarks.server_cost import measure


def test_all_requests_complete_and_both_clocks_say_something() -> None:
    result = measure(rate_rps=20.0, duration_s=1.5, workers=1)
    assert result["completed"] == result["offered"] > 5
    assert 0.0 < result["server_ttft_ms"]["p50"] <= result["client_ttft_ms"]["p99"]
