"""The figures of a run: the keys of `nexusengine sim run`, and what only a real client can say."""

from __future__ import annotations

import math
from collections import Counter, defaultdict
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import numpy as np

from nexusengine.loadgen.record import Record
from nexusengine.slo import Verdict, judge

_PERCENTILES = (50, 90, 99)
_LONGEST_SHARE = 0.1


def verdict(record: Record) -> Verdict | None:
    """By the client's clock, from the instant at which the request was to be sent; None without an SLO. The strict
    contract is the server's word where it gives it: the client does not see how many tokens an event has."""
    slo = record.item.slo
    if slo is None:
        return None
    if not record.completed:
        refused = record.status in (429, 503)
        return Verdict(False, False, "refused" if refused else "unfinished" if record.error == "timeout" else "failed")
    strict = record.nexus.get("met_strict") if record.nexus else None
    return judge(
        slo,
        arrival_s=record.intended_s,
        first_token_s=record.first_s,
        last_token_s=record.last_s,
        output_tokens=record.output_tokens,
        strict=record.in_time if strict is None else bool(strict),
    )


def summary(records: Sequence[Record]) -> dict[str, Any]:
    """Of one run. Every share is of all requests offered; null where nothing can be said."""
    verdicts = [(r, v) for r in records if (v := verdict(r)) is not None]
    by_class: dict[str, list[bool]] = defaultdict(list)
    for record, v in verdicts:
        by_class[record.item.slo_class or "custom"].append(v.met)
    done = [r for r in records if r.completed]
    ended_s = max((r.ended_s for r in records), default=math.nan)
    began_s = min((r.intended_s for r in records), default=math.nan)
    tokens = sum(r.output_tokens for r in done)
    return {
        "offered": len(records),
        "completed": len(done),
        "attainment": _share(v.met for _, v in verdicts),
        "attainment_strict": _share(v.strict_met for _, v in verdicts),
        "attainment_by_class": {name: _share(met) for name, met in sorted(by_class.items())},
        "attainment_longest_decile": _longest_decile(verdicts),
        "attainment_token_weighted": _token_weighted(verdicts),
        "missed": dict(Counter(v.missed for _, v in verdicts if v.missed)),
        "ttft_ms": spread(done, lambda r: 1e3 * r.ttft_s),
        "tpot_ms": spread(done, lambda r: 1e3 * r.tpot_s),
        "e2e_ms": spread(done, lambda r: 1e3 * r.e2e_s),
        "output_tokens_per_s": _rounded(tokens / (ended_s - began_s)) if tokens else 0.0,
        "worst_wait_s": _rounded(max(map(_wait_s, records), default=math.nan)),
        "preemptions": sum(r.nexus["preemptions"] for r in done if r.nexus),
        "errors": dict(Counter(r.error for r in records if r.error)),
        "late_ms": spread(records, lambda r: 1e3 * r.late_s),
        "ttft_from_sending_ms": spread(done, lambda r: 1e3 * (r.first_s - r.sent_s)),
        "server": _of_the_server(done),
    }


def spread(records: Iterable[Record], value: Callable[[Record], float]) -> dict[str, float | None]:
    """mean, p50, p90, p99 of the finite values; null without one."""
    values = np.array([v for r in records if math.isfinite(v := value(r))])
    if not len(values):
        return dict.fromkeys(("mean", *(f"p{p}" for p in _PERCENTILES)))
    at = np.percentile(values, _PERCENTILES)
    return {
        "mean": _rounded(float(values.mean())),
        **{f"p{p}": _rounded(float(v)) for p, v in zip(_PERCENTILES, at, strict=True)},
    }


def _wait_s(record: Record) -> float:
    """Until its first token, or until it was given up without one."""
    return (record.ended_s if math.isnan(record.first_s) else record.first_s) - record.intended_s


def _longest_decile(verdicts: Sequence[tuple[Record, Verdict]]) -> float | None:
    """Of the tenth with the longest prompts."""
    longest = sorted(verdicts, key=lambda rv: -rv[0].item.prompt_tokens)[: math.ceil(_LONGEST_SHARE * len(verdicts))]
    return _share(v.met for _, v in longest)


def _token_weighted(verdicts: Sequence[tuple[Record, Verdict]]) -> float | None:
    weights = [r.item.prompt_tokens + r.item.output_tokens for r, _ in verdicts]
    met = sum(w for w, (_, v) in zip(weights, verdicts, strict=True) if v.met)
    return _rounded(met / sum(weights)) if weights else None


def _of_the_server(done: Sequence[Record]) -> dict[str, Any] | None:
    """What the server says of the same requests, by its own clock and from when they arrived there."""
    told = [r for r in done if r.nexus is not None]
    if not told:
        return None

    def field(name: str) -> Callable[[Record], float]:
        return lambda r: math.nan if r.nexus is None or r.nexus[name] is None else float(r.nexus[name])

    off = [abs(field("predicted_ttft_ms")(r) / field("ttft_ms")(r) - 1) for r in told]
    return {
        "attainment": _share(bool(r.nexus["met"]) for r in told if r.nexus and r.nexus["met"] is not None),
        "unattainable": sum(bool(r.nexus["unattainable"]) for r in told if r.nexus),
        "ttft_ms": spread(told, field("ttft_ms")),
        "tpot_ms": spread(told, field("tpot_ms")),
        "queue_ms": spread(told, field("queue_ms")),
        "predicted_ttft_off": _rounded(float(np.median(off))),
        "by_worker": dict(sorted(Counter(str(r.nexus["worker"]) for r in told if r.nexus).items())),
    }


def _share(met: Iterable[bool]) -> float | None:
    found = list(met)
    return _rounded(sum(found) / len(found)) if found else None


def _rounded(value: float) -> float | None:
    return None if math.isnan(value) else round(value, 4)
