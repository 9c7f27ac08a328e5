"""When tokens are due, and whether a service level objective was met. PURE.

Met means: finished, first token within `ttft_s` of arrival, and the mean time of each further token within `tpot_s`.
The strict contract wants token k (from 0) by arrival + ttft_s + k * tpot_s, for every k.
"""

from __future__ import annotations

import math

import numpy as np

from nexusengine.arrays import F8, I4, I8
from nexusengine.types import SLO, Verdict


def first_token_due_s(arrival_s: float, slo: SLO | None) -> float:
    """The timestamp by which the first token is due; infinite without an SLO."""
    return math.inf if slo is None else arrival_s + slo.ttft_s


def first_tokens_due_s(arrival_s: F8, ttft_s: F8) -> F8:
    """Instants `[N]` by which first tokens are due; infinite without an SLO (ttft_s NaN)."""
    due_s: F8 = arrival_s + ttft_s
    return np.where(np.isnan(due_s), np.inf, due_s)


def tokens_due_s(arrival_s: F8, ttft_s: F8, tpot_s: F8, number: I4 | I8) -> F8:
    """Timestamps `[N]` by which output tokens are due by the strict contract; infinite without an SLO.

    Args:
        arrival_s, ttft_s, tpot_s: `[N]`, NaN where there is no SLO.
        number: `[N]`, of the output token, from 0.
    """
    due_s: F8 = first_tokens_due_s(arrival_s, ttft_s) + number * np.where(np.isnan(tpot_s), 0.0, tpot_s)
    return due_s


def judge(
    slo: SLO, *, arrival_s: float, first_token_s: float, last_token_s: float, output_tokens: int, strict: bool = True
) -> Verdict:
    """Whether a request that finished met its SLO.

    Args:
        strict: whether each token was in time by the strict contract; what cannot be seen from the first and the last.
    """
    if first_token_s - arrival_s > slo.ttft_s:
        return Verdict(False, False, "ttft")
    if output_tokens > 1 and (last_token_s - first_token_s) / (output_tokens - 1) > slo.tpot_s:
        return Verdict(False, False, "tpot")
    if slo.e2e_s is not None and last_token_s - arrival_s > slo.e2e_s:
        return Verdict(False, False, "e2e")
    return Verdict(True, strict)
