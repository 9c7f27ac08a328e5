"""The figures of a run: the keys and definitions of sim.report, and what only a real client can say."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import numpy as np

from nexusengine.loadgen.record import Record
from nexusengine.sim.report import rounded_numbers
from nexusengine.sim.verdicts import longest_tenth
from nexusengine.slo.due import judge
from nexusengine.types import Missed, Verdict

_PERCENTILES = (50, 90, 99)


def verdict(record: Record) -> Verdict:
    """Judge a response by the client's clock, from when the request was to be sent.

    Without an SLO it is met when the request completes. The strict contract is the server's word where it gives it: the
    client does not see how many tokens an event has.
    """
    if not record.completed:
        return Verdict(False, False, _missed(record))
    slo = record.item.slo
    if slo is None:
        return Verdict(True, True)
    strict = record.nexus.get("met_strict") if record.nexus else None
    return judge(
        slo,
        arrival_s=record.intended_s,
        first_token_s=record.first_s,
        last_token_s=record.last_s,
        output_tokens=record.output_tokens,
        strict=record.in_time if strict is None else bool(strict),
    )


def _missed(record: Record) -> Missed:
    error = record.error or ""
    if error == "timeout" or error.endswith("deadline_exceeded"):
        return "unfinished"
    return "refused" if record.status in (400, 429) or error.endswith("overloaded") else "failed"


def summary(records: Sequence[Record]) -> dict[str, Any]:
    """Of one run. Every share is of all requests offered; null where nothing can be said."""
    verdicts = [verdict(r) for r in records]
    met = np.array([v.met for v in verdicts], np.bool_)
    strict = np.array([v.strict_met for v in verdicts], np.bool_)
    prompt_tokens = np.array([r.item.prompt_tokens for r in records], np.int64)
    weights = prompt_tokens + np.array([r.item.output_tokens for r in records], np.int64)
    done = [r for r in records if r.completed]
    busy_s = max((r.ended_s for r in records), default=math.nan) - min(r.intended_s for r in records)
    sent_s = max(r.intended_s for r in records) - min(r.intended_s for r in records)
    result = {
        "offered": len(records),
        "completed": len(done),
        "attainment": met.mean(),
        "attainment_strict": strict.mean(),
        "attainment_by_class": _by_class(records, met),
        "attainment_strict_by_class": _by_class(records, strict),
        "attainment_longest_decile": met[longest_tenth(prompt_tokens)].mean(),
        "attainment_token_weighted": (met * weights).sum() / weights.sum(),
        "missed": dict(Counter(v.missed for v in verdicts if v.missed)),
        "ttft_ms": spread(records, lambda r: 1e3 * r.ttft_s),
        "tpot_ms": spread(done, lambda r: 1e3 * r.tpot_s),
        "e2e_ms": spread(done, lambda r: 1e3 * r.e2e_s),
        "output_tokens_per_s": sum(r.output_tokens for r in done) / busy_s,
        "goodput_tokens_per_s": sum(r.output_tokens for r, v in zip(records, verdicts, strict=True) if v.met) / busy_s,
        "offered_rps": len(records) / sent_s if sent_s > 0 else None,
        "worst_wait_s": max(map(_wait_s, records)),
        "preemptions": sum(r.nexus["preemptions"] for r in done if r.nexus),
        "errors": dict(Counter(r.error for r in records if r.error)),
        "late_ms": spread(records, lambda r: 1e3 * r.late_s),
        "ttft_from_sending_ms": spread(records, lambda r: 1e3 * (r.first_s - r.sent_s)),
        "server": _of_the_server(done),
    }
    rounded: dict[str, Any] = rounded_numbers(result)
    return rounded


def spread(records: Iterable[Record], value: Callable[[Record], float]) -> dict[str, float]:
    return _spread_of([value(r) for r in records])


def _spread_of(given: Sequence[float]) -> dict[str, float]:
    """mean, p50, p90, p99 of the finite values; NaN without one."""
    values = np.array([v for v in given if math.isfinite(v)])
    if not len(values):
        return dict.fromkeys(("mean", *(f"p{p}" for p in _PERCENTILES)), math.nan)
    at = np.percentile(values, _PERCENTILES).tolist()
    return {"mean": float(values.mean()), **{f"p{p}": v for p, v in zip(_PERCENTILES, at, strict=True)}}


def _by_class(records: Sequence[Record], met: np.ndarray) -> dict[str, float]:
    names = np.array([r.item.slo_class or "none" for r in records])
    return {name: float(met[names == name].mean()) for name in sorted(set(names.tolist()))}


def _wait_s(record: Record) -> float:
    """Until its first token, or until it was given up without one."""
    return (record.ended_s if math.isnan(record.first_s) else record.first_s) - record.intended_s


def _of_the_server(done: Sequence[Record]) -> dict[str, Any] | None:
    """What the server says of the same requests, by its own clock and from when they arrived there."""
    told = [r.nexus for r in done if r.nexus is not None]
    if not told:
        return None

    def of(name: str) -> dict[str, float]:
        return _spread_of([n[name] for n in told if n[name] is not None])

    judged = [bool(n["met"]) for n in told if n["met"] is not None]
    predicted = [n for n in told if n["predicted_ttft_ms"] is not None]
    off = [abs(n["predicted_ttft_ms"] / n["ttft_ms"] - 1) for n in predicted]
    return {
        "attainment": float(np.mean(judged)) if judged else None,
        "unattainable": sum(bool(n["unattainable"]) for n in told),
        "ttft_ms": of("ttft_ms"),
        "tpot_ms": of("tpot_ms"),
        "queue_ms": of("queue_ms"),
        "predicted_ttft": len(predicted),
        "predicted_ttft_off": float(np.median(off)) if off else None,
        "predicted_ttft_off_p90": float(np.percentile(off, 90)) if off else None,
        "by_worker": dict(sorted(Counter(str(n["worker"]) for n in told).items())),
    }
