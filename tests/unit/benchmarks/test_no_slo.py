"""Without an SLO LENS serves as FCFS does, on any device and with KV blocks to spare or not."""

from __future__ import annotations

import pytest

from benchmarks.no_slo import CPU, LENGTHS, figures, jobs_of, serve
from nexusengine.profiles.registry import load_profile


@pytest.mark.parametrize(
    ("profile", "rate_rps", "kv_tokens"), [("h100", 30.0, None), ("h100", 30.0, 20_000), (CPU, 1.5, None)]
)
def test_lens_ends_every_request_without_an_slo_when_fcfs_does(
    profile: str, rate_rps: float, kv_tokens: int | None
) -> None:
    device = load_profile(profile)
    jobs = jobs_of(LENGTHS[profile == CPU], rate_rps, 60, 3, "gamma:2")
    lens, fcfs = (serve(device, policy, jobs, 3, kv_tokens) for policy in ("lens", "fcfs:budget=2048"))
    assert figures(lens) == figures(fcfs)
    assert [e.ended_s for e in lens.ended] == [e.ended_s for e in fcfs.ended]
