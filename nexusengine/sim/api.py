"""A simulation from one specification: what the command line, benchmarks and `nexusengine plan` call.

result = simulate(SimSpec(trace="azure2023_conv.csv.gz", devices="2xa100", engine="lens", rate_rps=6.0))
result.metrics["attainment"]
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from typing import Any

from nexusengine.errors import ConfigError
from nexusengine.profiles.base import DeviceProfile
from nexusengine.profiles.registry import load_profile as packaged_profile
from nexusengine.router.placement.registry import make_policy as make_router_policy
from nexusengine.scheduler.registry import make_policy as make_engine_policy
from nexusengine.sim.cluster import HOPS, Cluster, LinkSettings, Outcome
from nexusengine.sim.engine import EngineSettings, SimEngine
from nexusengine.sim.faults import parse_fault
from nexusengine.sim.models import make_sim_model
from nexusengine.sim.report import report, rounded_numbers
from nexusengine.sim.this import expand, profile_of
from nexusengine.sim.timeline import Sample, Sampler
from nexusengine.sim.workload.build import Builder, Workload, WorkloadSpec
from nexusengine.sim.workload.draw import Stream, rng_for
from nexusengine.sim.workload.recording import Recording

_GRACE_S = 2.0
_REPORTS_BEFORE_STALLED_S = 4.0
_DEVICE = re.compile(r"(?:([1-9][0-9]*)x)?(.+)")

LoadProfile = Callable[[str, str], DeviceProfile]


@dataclass(frozen=True, slots=True, kw_only=True)
class SimSpec:
    """As the options of `nexusengine sim run`.

    trace, arrivals, rate_rps, speed, duration_s, classes, scale, stated_limit: see WorkloadSpec. devices:
    "h100,a100,2xl4", or those of a recorded trace: see sim.this.
    perf: a performance model by name, oracle or scaled:F. scheduler_cost_s: CPU time of the scheduler in every step;
    None: as measured while simulating. request_timeout_s: after which a request is given up, as by the server: so
    every overload ends. max_model_len: longest prompt + output; a worker's KV capacity may allow less. faults: see
    faults.parse_fault. timeline: keep samples of the load.
    """

    trace: str | tuple[str, ...]
    devices: str
    arrivals: str = "trace"
    rate_rps: float | None = None
    speed: float = 1.0
    duration_s: float | None = None
    model: str = "llama-3.1-8b"
    engine: str = "lens"
    router: str = "prism"
    classes: str = "interactive"
    seed: int = 0
    perf: str = "online"
    noise: bool = True
    scheduler_cost_s: float | None = 0.0
    prefix_caching: bool = False
    max_batch_tokens: int = 2048
    max_running: int = 256
    max_waiting: int = 1024
    block_size: int = 16
    kv_tokens: int | None = None
    max_model_len: int = 131_072
    link_delay_s: float = 0.0005
    snapshot_period_s: float = 0.1
    loss: float = 0.0
    faults: tuple[str, ...] = ()
    request_timeout_s: float = 600.0
    scale: float | None = None
    stated_limit: str = "none"
    timeline: bool = False

    def workload(self, max_tokens: int) -> WorkloadSpec:
        return WorkloadSpec(
            trace=self.trace,
            arrivals=self.arrivals,
            rate_rps=self.rate_rps,
            speed=self.speed,
            duration_s=self.duration_s,
            classes=self.classes,
            seed=self.seed,
            max_tokens=max_tokens,
            scale=self.scale,
            stated_limit=self.stated_limit,
        )


@dataclass(frozen=True, slots=True)
class SimResult:
    """A simulation that has ended.

    Attributes:
        metrics: see sim.report.
        outcomes: one a request, in order of arrival.
        workload: what was offered.
        builder: for more simulations of the same trace.
    """

    spec: SimSpec
    metrics: dict[str, Any]
    outcomes: list[Outcome]
    workload: Workload
    builder: Builder
    timeline: list[Sample] = field(default_factory=list)


def parse_devices(text: str) -> list[str]:
    """`h100,2xl4` is h100, l4, l4. Raises ConfigError."""
    devices: list[str] = []
    for word in filter(None, (w.strip() for w in text.split(","))):
        match = _DEVICE.fullmatch(word)
        assert match is not None
        devices += [match[2]] * int(match[1] or 1)
    if not 1 <= len(devices) <= 1024:
        raise ConfigError(f"{text!r} names {len(devices)} devices; write e.g. h100,2xl4", param="devices")
    return devices


def simulate(
    spec: SimSpec,
    *,
    load_profile: LoadProfile | None = None,
    builder: Builder | None = None,
    progress: Callable[[float, int, int], None] = lambda now_s, ended, offered: None,
    enough_of: Callable[[Workload], Callable[[Outcome], bool]] | None = None,
) -> SimResult:
    """Run `spec` to its end.

    Args:
        builder: one that has read the trace.
        enough_of: makes, for the workload, a function that is asked after the end of each request; True ends the
            simulation there.
        progress: called now and then with (virtual seconds, requests ended, requests offered).

    Raises:
        ConfigError: something is wrong with the specification.
    """
    _check(spec)
    workload_spec = spec.workload(spec.max_model_len)
    builder = Builder(workload_spec) if builder is None else builder.with_spec(workload_spec)
    recording = getattr(builder.source, "recording", None)
    names = expand(parse_devices(spec.devices), recording)
    profiles = profiles_of(names, spec.model, recording, load_profile)
    settings = EngineSettings(
        max_running=spec.max_running,
        max_waiting=spec.max_waiting,
        max_batch_tokens=spec.max_batch_tokens,
        block_size=spec.block_size,
        prefix_caching=spec.prefix_caching,
        kv_tokens=spec.kv_tokens,
        scheduler_cost_s=spec.scheduler_cost_s,
        noise=spec.noise,
        answer_delay_s=HOPS * spec.link_delay_s,
    )
    longest = max(_longest(spec, p) for p in profiles.values())
    builder = builder.with_spec(spec.workload(longest))
    workload = builder.build()
    if spec.prefix_caching:
        _check_blocks(workload, spec.block_size)
    makers = [_Maker(spec, settings, profiles[name], i) for i, name in enumerate(names)]
    sampler = Sampler(workload.duration_s) if spec.timeline else None
    cluster = Cluster(
        makers,
        make_router_policy(spec.router),
        LinkSettings(spec.link_delay_s, spec.snapshot_period_s, spec.loss),
        rng_for(spec.seed, Stream.LOSS),
        faults=[parse_fault(text, len(names)) for text in spec.faults],
        until_s=workload.duration_s + spec.request_timeout_s + _GRACE_S,
        last_arrival_s=workload.duration_s,
        timeout_s=spec.request_timeout_s,
        progress=lambda now_s, ended: progress(now_s, ended, len(workload.jobs)),
        enough=enough_of(workload) if enough_of else lambda outcome: False,
        sample=sampler,
        sample_period_s=sampler.period_s if sampler else 1.0,
    )
    outcomes = cluster.run(workload.jobs)
    metrics = report(cluster, outcomes, workload.duration_s)
    metrics["workload"] = rounded_numbers(workload.notes)
    return SimResult(spec, metrics, outcomes, workload, builder, sampler.samples if sampler else [])


def profiles_of(
    names: Iterable[str], model: str, recording: Recording | None, load_profile: LoadProfile | None
) -> dict[str, DeviceProfile]:
    """The profile of each device, also of those that a trace was recorded on. Raises ConfigError."""
    load = load_profile or packaged_profile

    def other(name: str) -> DeviceProfile:
        try:
            return load(name, model)
        except ConfigError as error:
            if recording is None or "/" in name:
                raise
            hint = f"; the trace was recorded with {recording.server.model}: name a model like it with --model"
            raise ConfigError(error.message + hint, param="model") from None

    return {
        name: profile_of(name, recording, load) if recording and name.startswith("this:") else other(name)
        for name in names
    }


class _Maker:
    """Makes worker `index`'s engine, and another one with fresh noise and nothing learned when its process restarts."""

    def __init__(self, spec: SimSpec, settings: EngineSettings, profile: DeviceProfile, index: int) -> None:
        self._spec, self._settings, self._profile, self._index = spec, settings, profile, index
        self._made = 0

    def __call__(self) -> SimEngine:
        self._made += 1
        return SimEngine(
            self._profile,
            make_engine_policy(self._spec.engine),
            make_sim_model(self._spec.perf, self._profile),
            self._settings,
            max_model_len=self._spec.max_model_len,
            rng=rng_for(self._spec.seed, Stream.NOISE, self._index, self._made),
        )


def _longest(spec: SimSpec, profile: DeviceProfile) -> int:
    kv_tokens = spec.kv_tokens or profile.identity.kv_capacity_tokens
    return min(spec.max_model_len, kv_tokens // spec.block_size * spec.block_size)


def _check_blocks(workload: Workload, block_size: int) -> None:
    sizes = {job.blocks.tokens for job in workload.jobs if job.blocks is not None}
    for size in sizes:
        if size % block_size:
            raise ConfigError(
                f"the trace names blocks of {size} tokens, which are not made of KV blocks of {block_size} tokens",
                param="block_size",
            )


def _check(spec: SimSpec) -> None:
    for name, low, high in (
        ("link_delay_s", 0.0, 10.0),
        ("snapshot_period_s", 0.001, _REPORTS_BEFORE_STALLED_S),
        ("loss", 0.0, 0.9),
        ("request_timeout_s", 1.0, 86_400.0),
        ("max_batch_tokens", 16, 65_536),
        ("max_running", 1, 4096),
        ("max_waiting", 1, 100_000),
        ("block_size", 1, 1024),
        ("max_model_len", 16, 10**8),
        ("seed", 0, 2**63),
    ):
        value = getattr(spec, name)
        if not (math.isfinite(value) and low <= value <= high):
            raise ConfigError(f"{name} must be between {low} and {high}, got {value}", param=name)
    if spec.kv_tokens is not None and spec.kv_tokens < spec.block_size:
        raise ConfigError(f"kv_tokens must be at least one block, {spec.block_size}, got {spec.kv_tokens}")
    if spec.scheduler_cost_s is not None and not 0.0 <= spec.scheduler_cost_s <= 1.0:
        raise ConfigError(
            f"scheduler cost must be 0 to 1 s a step, got {spec.scheduler_cost_s}", param="scheduler_cost"
        )
