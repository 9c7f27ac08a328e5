"""From a specification to jobs: source, arrivals, clipping, classes, closed loops."""

from __future__ import annotations

import math
from collections import Counter
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np

from nexusengine.errors import ConfigError
from nexusengine.sim.job import Job, TraceBlocks, make_job
from nexusengine.sim.workload.arrivals import LONGEST_S, arrivals_of, parse_arrivals
from nexusengine.sim.workload.draw import Drawn, Source, Stream, rng_for
from nexusengine.sim.workload.entries import LARGEST_COUNT, Entry, Trace, json_rows, read_trace
from nexusengine.sim.workload.lengths import PREFIX, Synthetic
from nexusengine.sim.workload.recorded import Recorded
from nexusengine.sim.workload.recording import is_recording, read_recording
from nexusengine.sim.workload.servegen import ServeGen, is_servegen
from nexusengine.sim.workload.sessions import draw_sessions, fitting_scale, named_blocks
from nexusengine.slo.classes import CLASSES, MIXED, SLOClass, load_classes
from nexusengine.slo.resolve import NONE

RECORDED = "recorded"
"""As SLO classes and as stated limit: what each request of a recorded trace had."""
_DEFAULT_DURATION_S = 600.0


@dataclass(frozen=True, slots=True)
class WorkloadSpec:
    """What is offered to a simulated server.

    Attributes:
        trace: a file, or `lengths:...`; several files of a recorded trace.
        arrivals: trace, poisson or gamma:CV.
        rate_rps: requests (sessions for closed loops) a second; None: the trace's own.
        duration_s: None: the whole trace, or 600 s.
        speed: how many times as fast as in the trace its requests arrive, where no rate is given.
        classes: a class, `mixed`, a TOML file, `none`, or `recorded`: the SLO that each request of the trace had.
        max_tokens: longest prompt + output; longer ones are clipped.
        scale: lengths are divided by it; None: 1, or for closed loops what makes 99 % fit.
        stated_limit: max_tokens of the requests: "none", "exact" (what comes), a number of tokens or "recorded".
    """

    trace: str | tuple[str, ...]
    arrivals: str = "trace"
    rate_rps: float | None = None
    duration_s: float | None = None
    classes: str = "interactive"
    seed: int = 0
    max_tokens: int = 131_072
    scale: float | None = None
    stated_limit: str = "none"
    speed: float = 1.0


@dataclass(frozen=True, slots=True)
class Workload:
    """jobs in order of arrival. duration_s: of the window in which they arrive. notes: what was done to the trace."""

    jobs: tuple[Job, ...]
    duration_s: float
    classes: tuple[str, ...]
    notes: dict[str, Any] = field(default_factory=dict)


def open_source(trace: str | tuple[str, ...]) -> Source | Trace:
    """A source of single requests, or a trace of sessions. Raises ConfigError."""
    if not isinstance(trace, str):
        if len(trace) > 1:
            return _recorded(trace)
        (trace,) = trace
    if trace.startswith(PREFIX):
        return Synthetic(trace)
    if ".jsonl" in trace:
        for _, row in json_rows(Path(trace)):
            if is_servegen(row):
                return ServeGen(trace)
            break
    if is_recording(trace):
        return _recorded((trace,))
    read = read_trace(trace)
    return read if read.sessions else Recorded(read)


def _recorded(paths: tuple[str, ...]) -> Recorded:
    for path in paths:
        if not is_recording(path):
            raise ConfigError(
                f"{path} is not a trace that nexusengine serve recorded; only the files of one can be read together",
                param="trace",
            )
    recording = read_recording(paths)
    return Recorded(Trace(recording.name, recording.entries), recording)


def read_classes(text: str) -> tuple[dict[str, SLOClass], dict[str, float]]:
    """Classes and their shares. Raises ConfigError."""
    if text in (RECORDED, NONE):
        return {}, {}
    if text in CLASSES:
        return dict(CLASSES), {text: 1.0}
    if text == "mixed":
        return dict(CLASSES), dict(MIXED)
    if not text.endswith(".toml"):
        known = f"{', '.join(CLASSES)}, mixed, none, a .toml file, or recorded for a trace that serve recorded"
        raise ConfigError(f"classes are {known}; got {text!r}", param="classes")
    classes, shares = load_classes(text)
    total = sum(shares.values())
    if total <= 0:
        raise ConfigError(f"{text}: no class has a share above 0", param="classes")
    return classes, {name: share / total for name, share in shares.items() if share > 0}


class Builder:
    """Makes the workload of a specification for any rate and seed; the trace is read once."""

    def __init__(self, spec: WorkloadSpec, source: Source | Trace | None = None) -> None:
        """Raises ConfigError for what cannot be read or does not go together."""
        given = {"rate": spec.rate_rps, "duration": spec.duration_s, "scale": spec.scale, "speed": spec.speed}
        for name, value in given.items():
            if value is not None and not (math.isfinite(value) and value > 0):
                raise ConfigError(f"{name} must be a number above 0, got {value}", param=name)
        if spec.duration_s is not None and spec.duration_s > LONGEST_S:
            raise ConfigError(f"duration must be at most {LONGEST_S:g} s, got {spec.duration_s:g}", param="duration")
        self.spec = spec
        self.source = open_source(spec.trace) if source is None else source
        self._cv = parse_arrivals(spec.arrivals)
        for name in ("classes", "stated_limit"):
            if getattr(spec, name) == RECORDED and getattr(self.source, "recording", None) is None:
                raise ConfigError(
                    f"--{name.replace('_', '-')} recorded: {self.source.name} is not a trace that nexusengine serve "
                    "recorded",
                    param=name,
                )
        self._classes, self._shares = read_classes(spec.classes)
        self._limit = _parse_limit(spec.stated_limit)

    def with_spec(self, spec: WorkloadSpec) -> Builder:
        """Another specification of the same trace."""
        return Builder(spec, self.source if spec.trace == self.spec.trace else None)

    def build(self) -> Workload:
        """Raises ConfigError if nothing arrives, or a rate is needed and missing."""
        if isinstance(self.source, Trace):
            jobs, duration_s, notes = self._sessions(self.source)
        else:
            jobs, duration_s, notes = self._requests(self.source)
        if duration_s > LONGEST_S:
            raise ConfigError(
                f"the requests of {self.source.name} arrive over {duration_s:.3g} s; at most {LONGEST_S:g} s are "
                "simulated",
                param="rate" if self.spec.rate_rps is not None else "trace",
            )
        if not jobs:
            raise ConfigError(
                f"no request arrives in {duration_s:g} s of {self.source.name} at this rate", param="duration"
            )
        return Workload(tuple(jobs), duration_s, tuple(self._shares), notes)

    # ---- open loop -----------------------------------------------------------------------------------------------

    def _requests(self, source: Source) -> tuple[list[Job], float, dict[str, Any]]:
        spec = self.spec
        if self._cv is None:
            rate_rps = spec.rate_rps
            if rate_rps is None and spec.speed != 1.0 and source.rate_rps is not None:
                rate_rps = spec.speed * source.rate_rps
            drawn = source.with_arrivals(rate_rps, spec.duration_s, spec.seed)
            duration_s = spec.duration_s or (float(drawn.arrival_s[-1]) if len(drawn.arrival_s) else 0.0)
        else:
            rate_rps = spec.rate_rps or (None if source.rate_rps is None else spec.speed * source.rate_rps)
            if rate_rps is None:
                raise ConfigError(f"{source.name} has no rate of its own: give --rate", param="rate")
            duration_s = spec.duration_s or _DEFAULT_DURATION_S
            arrivals = arrivals_of(self._cv, rate_rps, duration_s, spec.seed)
            drawn = replace(source.lengths(len(arrivals), spec.seed), arrival_s=arrivals)
        scale = spec.scale or 1.0
        inputs = np.clip(drawn.input_tokens // scale, 1, LARGEST_COUNT).astype(np.int64)
        outputs = np.clip(drawn.output_tokens // scale, 1, LARGEST_COUNT).astype(np.int64)
        fitted_inputs, fitted_outputs = _clip(inputs, outputs, spec.max_tokens)
        names = self._class_of(len(inputs))
        unchanged = (fitted_inputs == drawn.input_tokens) & (fitted_outputs == drawn.output_tokens)
        jobs = [
            self._job(f"r{i}", *row, *_recorded_of(drawn, i, row[1], bool(unchanged[i])))
            for i, row in enumerate(
                zip(drawn.arrival_s.tolist(), fitted_inputs.tolist(), fitted_outputs.tolist(), names, strict=True)
            )
        ]
        notes = {
            "requests": len(jobs),
            "rate_rps": len(jobs) / duration_s if duration_s else None,
            "prompts_clipped": int((fitted_inputs < inputs).sum()),
            "outputs_clipped": int((fitted_outputs < outputs).sum()),
            "input_tokens_mean": float(fitted_inputs.mean()) if jobs else None,
            "output_tokens_mean": float(fitted_outputs.mean()) if jobs else None,
        }
        if scale != 1.0:
            notes["lengths_divided_by"] = scale
        for name in ("dropped_windows", "dropped_clients"):
            if hasattr(source, name):
                notes[name] = getattr(source, name)
        return jobs, duration_s, notes

    def _class_of(self, count: int) -> list[str]:
        """The class of each request; "" for what has none, or has its own."""
        if not self._shares:
            return [""] * count
        names, shares = list(self._shares), np.cumsum(list(self._shares.values()))
        u = rng_for(self.spec.seed, Stream.CLASSES).random(count)
        return [names[min(k, len(names) - 1)] for k in np.searchsorted(shares, u, side="right").tolist()]

    def _job(
        self,
        request_id: str,
        arrival_s: float,
        inputs: int,
        outputs: int,
        name: str,
        blocks: TraceBlocks | None,
        entry: Entry | None = None,
    ) -> Job:
        """entry: what was recorded of it; its SLO and limit count where the specification says so."""
        limit = outputs if self._limit == 0 else self._limit
        if entry is not None and self.spec.stated_limit == RECORDED:
            limit = entry.max_tokens
        if entry is not None and self.spec.classes == RECORDED:
            slo, slo_class = entry.slo, entry.slo_class
        else:
            slo, slo_class = (self._classes[name].slo(inputs), name) if name else (None, None)
        return make_job(
            request_id,
            arrival_s,
            inputs,
            outputs if limit is None else min(outputs, limit),
            slo=slo,
            slo_class=slo_class,
            blocks=blocks,
            max_tokens=limit if limit is None else min(limit, self.spec.max_tokens - inputs),
            priority=0 if entry is None else entry.priority,
            tenant=None if entry is None else entry.tenant,
        )

    # ---- closed loops --------------------------------------------------------------------------------------------

    def _sessions(self, trace: Trace) -> tuple[list[Job], float, dict[str, Any]]:
        spec = self.spec
        if self._cv is None or spec.rate_rps is None:
            raise ConfigError(
                f"{trace.name} holds sessions without arrivals: give --arrivals poisson or gamma:CV, and --rate in "
                "sessions a second",
                param="arrivals",
            )
        duration_s = spec.duration_s or _DEFAULT_DURATION_S
        scale = spec.scale or fitting_scale(trace.sessions, spec.max_tokens)
        starts = draw_sessions(trace.sessions, self._cv, spec.rate_rps, duration_s, spec.seed)
        counts: Counter[str] = Counter()
        names = self._class_of(len(starts))
        jobs = [
            self._chain(trace.sessions[index], n, start_s, names[n], scale, counts)
            for n, (start_s, index) in enumerate(starts)
        ]
        notes = {
            "sessions": len(jobs),
            "requests_at_most": counts["requests"],
            "lengths_divided_by": scale,
            "prompts_clipped": counts["prompts"],
            "outputs_clipped": counts["outputs"],
        }
        return jobs, duration_s, notes

    def _chain(
        self, session: tuple[Entry, ...], n: int, start_s: float, name: str, scale: float, counts: Counter[str]
    ) -> Job:
        """The session's first job, with the others behind it; all of one class."""
        job: Job | None = None
        for i in range(len(session) - 1, -1, -1):
            entry = session[i]
            wanted_in, wanted_out = (
                int(min(max(tokens / scale, 1.0), LARGEST_COUNT))
                for tokens in (entry.input_tokens, entry.output_tokens)
            )
            fitted = _clip(np.array([wanted_in]), np.array([wanted_out]), self.spec.max_tokens)
            inputs, outputs = int(fitted[0][0]), int(fitted[1][0])
            counts["requests"] += 1
            counts["prompts"] += inputs < wanted_in
            counts["outputs"] += outputs < wanted_out
            blocks = None
            if entry.block_ids:
                ids, into_answer = named_blocks(session, i)
                named = inputs + outputs if into_answer else inputs
                blocks = TraceBlocks(ids[: -(-named // entry.block_tokens)], entry.block_tokens, named, scope=n + 1)
            before = self._job(f"s{n}.{i}", start_s if i == 0 else 0.0, inputs, outputs, name, blocks)
            think_s = session[i + 1].think_s if job is not None else 0.0
            job = replace(before, think_s=think_s, then=job)
        assert job is not None
        return job


def _recorded_of(drawn: Drawn, i: int, prompt_tokens: int, unchanged: bool) -> tuple[TraceBlocks | None, Entry | None]:
    """The blocks of request i, those of its answer too if its lengths are the trace's own, and what else is known."""
    entry = None if drawn.entries is None else drawn.entries[i]
    ids = () if drawn.blocks is None else drawn.blocks[i]
    named = prompt_tokens
    if entry is not None and entry.answer_ids and unchanged:
        ids = (*ids, *entry.answer_ids)
        named = max(len(ids) * entry.block_tokens, prompt_tokens)
    return (TraceBlocks(ids, drawn.block_tokens, named) if ids else None), entry


def _clip(inputs: Any, outputs: Any, max_tokens: int) -> tuple[Any, Any]:
    """Outputs get at most half of the context, prompts what is left; a clipped prompt keeps its beginning."""
    fits = inputs + outputs <= max_tokens
    outputs = np.where(fits, outputs, np.minimum(outputs, max(max_tokens // 2, 1)))
    return np.where(fits, inputs, np.minimum(inputs, max_tokens - outputs)), outputs


def _parse_limit(text: str) -> int | None:
    """None: no limit is stated; 0: exactly what comes; else tokens."""
    if text in ("none", RECORDED):
        return None
    if text == "exact":
        return 0
    if text.isascii() and text.isdigit() and len(text) < 17 and int(text) > 0:
        return int(text)
    raise ConfigError(
        f"stated_limit is none, exact, a number of tokens, or recorded, got {text!r}", param="stated_limit"
    )
