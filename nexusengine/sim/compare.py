"""What the simulator says of a recorded load, beside what the server did with it.

Both sides are judged by the server's clock, from arrival at the server. Left out on both: requests whose client went
away, because nobody knows how long their answers would have become.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from nexusengine.errors import ConfigError
from nexusengine.recording.format import Request
from nexusengine.sim.api import SimSpec, parse_devices, simulate
from nexusengine.sim.cluster import Outcome
from nexusengine.sim.report import rounded_numbers
from nexusengine.sim.this import changes_of_speed, expand
from nexusengine.sim.verdicts import refused
from nexusengine.sim.workload.build import Builder
from nexusengine.sim.workload.recording import Recording
from nexusengine.slo.due import judge
from nexusengine.slo.resolve import NONE

_LATENCIES = ("ttft_ms", "tpot_ms", "e2e_ms")
_PERCENTILES = (50, 90, 99)
_OWN_END = ("stop", "length")


@dataclass(frozen=True, slots=True)
class Served:
    """What became of a request, on either side. NaN and None where there is nothing to say.

    Attributes:
        slo_class: "none" without an SLO.
        met: the SLO was met; without one, the request was completed.
        end_s: after the first arrival, when its last token came.
    """

    slo_class: str
    met: bool
    completed: bool
    refused: bool
    worker: str | None
    ttft_ms: float
    tpot_ms: float
    e2e_ms: float
    output_tokens: int
    end_s: float


def compare(spec: SimSpec, *, seeds: Sequence[int] = (0,), steady: bool = False) -> dict[str, Any]:
    """Simulate a recorded trace and set the result beside the record.

    Args:
        spec: its trace is a recording, at its own arrivals.
        seeds: of the scatter of steps; the means of their figures are what is simulated.
        steady: leave out that the recorded devices were faster or slower at times, as their steps show.

    Returns:
        recorded and simulated: the figures of each; range_over_seeds: the lowest and highest of some; difference:
        simulated less recorded, shares in points, the rest in percent of what was recorded.

    Raises:
        ConfigError: the trace was not recorded, or would not be offered as it was.
    """
    for name, value in (
        ("arrivals", spec.arrivals != "trace"),
        ("rate", spec.rate_rps),
        ("speed", spec.speed != 1.0),
        ("duration", spec.duration_s),
        ("scale-lengths", spec.scale),
    ):
        if value:
            raise ConfigError(f"a recorded load is compared as it was; leave out --{name}", param=name)
    builder = Builder(spec.workload(spec.max_model_len))
    recording: Recording | None = getattr(builder.source, "recording", None)
    if recording is None:
        raise ConfigError(
            f"{spec.trace} was not recorded by nexusengine serve, so there is nothing to compare with", param="trace"
        )
    changes = () if steady else changes_of_speed(expand(parse_devices(spec.devices), recording), recording)
    results = [simulate(replace(spec, faults=(*spec.faults, *changes), seed=s), builder=builder) for s in seeds]
    kept = [i for i, request in enumerate(recording.requests) if request.ended != "left"]
    recorded = figures([_recorded(recording.requests[i]) for i in kept])
    runs = [figures([_simulated(result.outcomes[i]) for i in kept]) for result in results]
    simulated = _mean(runs)
    found = {
        "requests": len(kept),
        "left_out": {"client_went_away": len(recording.requests) - len(kept), "turned_away_unread": recording.unread},
        "recorded": recorded,
        "simulated": simulated,
        "difference": difference(recorded, simulated),
        "range_over_seeds": {
            "attainment": _range([run["attainment"] for run in runs]),
            **{f"{name}_p50": _range([run[name]["p50"] for run in runs]) for name in _LATENCIES},
        },
        "assumed": {
            "between_steps_ms": None if spec.scheduler_cost_s is None else 1e3 * spec.scheduler_cost_s,
            "link_delay_ms": 1e3 * spec.link_delay_s,
            "slowness_over_time": _range([float(fault.rpartition(":")[2]) for fault in changes]),
        },
        "workload": results[0].metrics["workload"],
    }
    rounded: dict[str, Any] = rounded_numbers(found)
    return rounded


def figures(served: Sequence[Served]) -> dict[str, Any]:
    """Of all requests on one side."""
    completed = [s for s in served if s.completed]
    busy_s = max((s.end_s for s in completed), default=math.nan)
    workers = Counter(s.worker for s in completed if s.worker is not None)
    classes = sorted({s.slo_class for s in served})
    return {
        "attainment": _share(s.met for s in served),
        "attainment_by_class": {name: _share(s.met for s in served if s.slo_class == name) for name in classes},
        "completed": len(completed),
        "refused": sum(s.refused for s in served),
        **{name: _percentiles([getattr(s, name) for s in served]) for name in _LATENCIES},
        "output_tokens_per_s": sum(s.output_tokens for s in completed) / busy_s if busy_s > 0 else None,
        "by_worker": dict(sorted(workers.items())),
    }


def difference(recorded: dict[str, Any], simulated: dict[str, Any]) -> dict[str, Any]:
    """Simulated less recorded: attainment in points; latencies and tokens a second in percent; counts as they are."""

    def percent(was: float | None, found: float | None) -> float | None:
        if was is None or found is None or not was > 0:
            return None
        return 100.0 * (found / was - 1.0)

    classes = recorded["attainment_by_class"].keys() & simulated["attainment_by_class"].keys()
    workers = recorded["by_worker"].keys() | simulated["by_worker"].keys()
    return {
        "attainment_points": 100.0 * (simulated["attainment"] - recorded["attainment"]),
        "attainment_by_class_points": {
            name: 100.0 * (simulated["attainment_by_class"][name] - recorded["attainment_by_class"][name])
            for name in sorted(classes)
        },
        "completed": simulated["completed"] - recorded["completed"],
        "refused": simulated["refused"] - recorded["refused"],
        **{
            f"{name.removesuffix('_ms')}_percent": {
                key: percent(recorded[name][key], simulated[name][key]) for key in recorded[name]
            }
            for name in _LATENCIES
        },
        "output_tokens_per_s_percent": percent(recorded["output_tokens_per_s"], simulated["output_tokens_per_s"]),
        "by_worker": {
            name: simulated["by_worker"].get(name, 0) - recorded["by_worker"].get(name, 0) for name in sorted(workers)
        },
    }


def _recorded(line: Request) -> Served:
    completed = line.ended in _OWN_END
    return Served(
        slo_class=line.slo_class or NONE,
        met=completed if line.met is None else line.met,
        completed=completed,
        refused=line.ended == "refused",
        worker=line.worker,
        ttft_ms=_number(line.ttft_ms),
        tpot_ms=_number(line.tpot_ms) if completed else math.nan,
        e2e_ms=_number(line.e2e_ms) if completed else math.nan,
        output_tokens=line.output_tokens,
        end_s=line.arrival_s + _number(line.e2e_ms) / 1e3,
    )


def _simulated(outcome: Outcome) -> Served:
    """By the engine's clock, as the server's timings are."""
    request, ended = outcome.job.request, outcome.ended
    completed = outcome.error is None and ended is not None
    first_s = ended.first_token_s if ended is not None else math.nan
    last_s = ended.ended_s if ended is not None and completed else math.nan
    tokens = ended.output_tokens if ended is not None else 0
    met = completed
    if completed and request.slo is not None:
        met = judge(
            request.slo,
            arrival_s=request.arrival_s,
            first_token_s=first_s,
            last_token_s=last_s,
            output_tokens=tokens,
        ).met
    return Served(
        slo_class=request.slo_class or NONE,
        met=met,
        completed=completed,
        refused=refused(outcome),
        worker=outcome.worker,
        ttft_ms=1e3 * (first_s - request.arrival_s),
        tpot_ms=1e3 * (last_s - first_s) / (tokens - 1) if tokens > 1 else math.nan,
        e2e_ms=1e3 * (last_s - request.arrival_s),
        output_tokens=tokens,
        end_s=last_s,
    )


def _range(values: Sequence[float]) -> list[float] | None:
    return [min(values), max(values)] if values else None


def _mean(runs: Sequence[Any]) -> Any:
    """Of the same figures of several runs; None where one has none."""
    if isinstance(runs[0], dict):
        return {key: _mean([run.get(key, 0) for run in runs]) for key in sorted({k for run in runs for k in run})}
    return None if None in runs else sum(runs) / len(runs)


def _number(value: float | None) -> float:
    return math.nan if value is None else value


def _share(met: Iterable[bool]) -> float:
    values = list(met)
    return float(np.mean(values)) if values else math.nan


def _percentiles(values: Sequence[float]) -> dict[str, float]:
    finite = np.array([v for v in values if math.isfinite(v)])
    if not len(finite):
        return dict.fromkeys(("mean", *(f"p{p}" for p in _PERCENTILES)), math.nan)
    at = np.percentile(finite, _PERCENTILES).tolist()
    return {"mean": float(finite.mean()), **{f"p{p}": v for p, v in zip(_PERCENTILES, at, strict=True)}}
