"""Replays a measured run of vLLM: its requests, its settings, its own policy, durations from a device profile.

Requests are taken in between steps, and steps are planned one ahead (see `pipelined`): a first token comes at the end
of the step after next. `vllm_steps` says how long a step takes.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from nexusengine.errors import ConfigError
from nexusengine.profiles.base import DeviceProfile
from nexusengine.profiles.composed import ComposedProfile
from nexusengine.profiles.links import LINKS, Link
from nexusengine.profiles.registry import load_profile
from nexusengine.scheduler.baselines.vllm import Vllm
from nexusengine.sim.engine import EngineSettings
from nexusengine.sim.job import Job, TraceBlocks, make_job
from nexusengine.sim.pipelined import PipelinedEngine
from nexusengine.sim.vllm_run import BLOCK_TOKENS, Measured, Sent, VllmSettings, graph_sizes
from nexusengine.sim.vllm_steps import AS_MEASURED, HOST, Factors, Host, StepCost, step_cost

_NEVER = float("inf")
_STATS_EVERY_S = 0.1
_OWN_NAMES, _OWN_NAMES_EACH = 2**40, 2**20
_STATISTICS: dict[str, Callable[[Any], Any]] = {
    "mean": np.nanmean,
    "p50": np.nanmedian,
    "p90": lambda v: np.nanquantile(v, 0.9),
    "p99": lambda v: np.nanquantile(v, 0.99),
}


@dataclass(frozen=True, slots=True)
class Replayed:
    """simulated: as measured. steps: of all engines; preemptions, cached_tokens: counted over all."""

    simulated: Measured
    steps: int
    preemptions: int
    cached_tokens: int


class Lane:
    """Engines that step together: one, or the data-parallel ones of a model with experts."""

    def __init__(self, engines: Sequence[PipelinedEngine], cost: StepCost) -> None:
        self.engines, self._cost = engines, cost
        self.inboxes: list[list[Job]] = [[] for _ in engines]
        self.queued_s: dict[str, float] = {}
        self.until_s = _NEVER
        self.steps = 0

    def step(self, now: float) -> None:
        """The step under way has ended, or the lane was idle and something came."""
        batches = []
        began: list[PipelinedEngine] = []
        for i, engine in enumerate(self.engines):
            engine.advance(now)
            arrived, self.inboxes[i] = self.inboxes[i], []
            for job in arrived:
                self.queued_s[job.request.request_id] = now
            batch = engine.next_step(arrived, now)
            if batch is not None:
                batches.append(batch)
                began.append(engine)
        self.until_s = now + self._cost(batches) if batches else _NEVER
        self.steps += bool(batches)
        for engine in began:
            engine.ends_at(self.until_s)


class Balancer:
    """vLLM's choice between data-parallel engines.

    Least 4 * waiting + running, by counts that are renewed every 100 ms and raised by what was sent since.
    """

    def __init__(self, engines: Sequence[PipelinedEngine]) -> None:
        self._engines = engines
        self._waiting, self._running = [0] * len(engines), [0] * len(engines)
        self._renewed_s = -_NEVER

    def choose(self, now: float) -> int:
        if now - self._renewed_s >= _STATS_EVERY_S:
            self._waiting = [e.waiting for e in self._engines]
            self._running = [e.running for e in self._engines]
            self._renewed_s = now
        chosen = min(range(len(self._engines)), key=lambda i: 4 * self._waiting[i] + self._running[i])
        self._waiting[chosen] += 1
        return chosen


def replay(
    profile: DeviceProfile,
    sent: Sequence[Sent],
    settings: VllmSettings,
    host: Host = HOST,
    *,
    factors: Factors = AS_MEASURED,
    scatter: np.random.Generator | None = None,
) -> Replayed:
    """Simulate a run.

    Args:
        profile: of one engine's device, or of the devices that share the model.
        sent: the requests.
        settings: of the engines.
        host: what vLLM adds to the kernels.
        factors: on the parts of each step.
        scatter: draws each step's deviation from its mean; None for none.

    Raises:
        ConfigError: the run cannot be simulated: a request that does not fit, or parts not measured.
    """
    engines = _engines(profile, sent, settings)
    lanes = _lanes(profile, engines, settings, host, factors, scatter)
    where = [(lane, i) for lane in lanes for i in range(len(lane.engines))]
    balancer = Balancer(engines)
    coming = deque(sorted(_jobs(sent), key=lambda job: job.request.arrival_s))
    now = 0.0
    while True:
        next_s = min(lane.until_s for lane in lanes)
        if coming and coming[0].request.arrival_s < next_s:
            job = coming.popleft()
            now = max(now, job.request.arrival_s)
            lane, i = where[balancer.choose(now)]
            lane.inboxes[i].append(job)
            if lane.until_s == _NEVER:
                lane.step(now)
        elif next_s < _NEVER:
            now = next_s
            for lane in lanes:
                if lane.until_s == next_s:
                    lane.step(now)
        else:
            break
    return _result(lanes, engines, sent)


def _engines(profile: DeviceProfile, sent: Sequence[Sent], settings: VllmSettings) -> list[PipelinedEngine]:
    longest = max(s.input_tokens + s.output_tokens for s in sent)
    engine_settings = EngineSettings(
        max_running=settings.max_num_seqs,
        max_waiting=len(sent),
        max_batch_tokens=settings.max_num_batched_tokens,
        block_size=settings.block_size,
        prefix_caching=settings.enable_prefix_caching,
        kv_tokens=settings.kv_tokens,
        noise=False,
    )
    return [
        PipelinedEngine(
            profile,
            Vllm(
                reserve_full=settings.scheduler_reserve_full_isl,
                longest_chunk=settings.long_prefill_token_threshold,
            ),
            engine_settings,
            max_model_len=settings.max_model_len or max(longest, 16),
            ahead=settings.async_scheduling,
        )
        for _ in range(settings.data_parallel_size)
    ]


def _lanes(
    profile: DeviceProfile,
    engines: list[PipelinedEngine],
    settings: VllmSettings,
    host: Host,
    factors: Factors,
    scatter: np.random.Generator | None,
) -> list[Lane]:
    def cost(together: int, link: Link | None) -> StepCost:
        graphs = graph_sizes(settings)
        return step_cost(
            profile, engines=together, link=link, host=host, graphs=graphs, factors=factors, scatter=scatter
        )

    experts = isinstance(profile, ComposedProfile) and profile.experts is not None
    if len(engines) == 1 or not experts:
        alone = cost(1, None)
        return [Lane([engine], alone) for engine in engines]
    if profile.identity.device not in LINKS:
        raise ConfigError(f"nothing is known of what {profile.identity.device} devices exchange and how fast")
    return [Lane(engines, cost(len(engines), LINKS[profile.identity.device]))]


def _jobs(sent: Sequence[Sent]) -> list[Job]:
    """Blocks behind those of the prompt have names of their own: a request that was preempted can find them again."""
    jobs = []
    for i, s in enumerate(sent):
        shared = s.blocks[: s.input_tokens // BLOCK_TOKENS]
        total = (s.input_tokens + s.output_tokens) // BLOCK_TOKENS
        own = tuple(_OWN_NAMES + i * _OWN_NAMES_EACH + k for k in range(total - len(shared)))
        blocks = TraceBlocks((*shared, *own), BLOCK_TOKENS, total * BLOCK_TOKENS)
        jobs.append(make_job(str(i), s.arrival_s, s.input_tokens, s.output_tokens, blocks=blocks))
    return jobs


def _result(lanes: Sequence[Lane], engines: Sequence[PipelinedEngine], sent: Sequence[Sent]) -> Replayed:
    queued = {key: at_s for lane in lanes for key, at_s in lane.queued_s.items()}
    ended = {e.job.request.request_id: e for engine in engines for e in engine.ended}
    keys = [str(i) for i in range(len(sent))]
    refused = [k for k in keys if ended[k].refused]
    if refused:
        s = sent[int(refused[0])]
        raise ConfigError(
            f"{len(refused)} requests can never fit, e.g. one of {s.input_tokens} + {s.output_tokens} tokens: the KV "
            f"cache holds {engines[0].kv.total_blocks * engines[0].kv.block_size}"
        )
    simulated = Measured.of(
        np.array([queued[k] for k in keys]),
        np.array([ended[k].first_token_s for k in keys]),
        np.array([ended[k].ended_s for k in keys]),
        np.array([s.output_tokens for s in sent], np.float64),
    )
    return Replayed(
        simulated,
        steps=sum(lane.steps for lane in lanes),
        preemptions=sum(engine.stats.preemptions for engine in engines),
        cached_tokens=sum(engine.stats.cached_tokens for engine in engines),
    )


def profile_for(spec: str, settings: VllmSettings) -> DeviceProfile:
    """Of as many devices as share the model in that run: rtxpro6000/M with 2 is rtxpro6000-tp2/M."""
    shards = settings.tensor_parallel_size
    if shards == 1 or f"-tp{shards}" in spec:
        return load_profile(spec)
    device, slash, model = spec.partition("/")
    return load_profile(f"{device}-tp{shards}{slash}{model}")


def figures(latencies: Measured) -> dict[str, float]:
    """Mean, p50, p90 and p99 of TTFT, TPOT and end to end, in seconds: `ttft_mean` and so on."""
    return {
        f"{what}_{name}": float(statistic(getattr(latencies, f"{what}_s")))
        for what in ("ttft", "tpot", "e2e")
        for name, statistic in _STATISTICS.items()
    }


def compare(simulated: Measured, measured: Measured) -> dict[str, float]:
    """Signed errors of the `figures` in percent: `ttft_mean_pct` and so on.

    Beside them the values in milliseconds, `ttft_mean_ms` simulated and `ttft_mean_measured_ms`.
    """
    out: dict[str, float] = {}
    values: dict[str, float] = {}
    theirs = figures(measured)
    for name, ours in figures(simulated).items():
        out[f"{name}_pct"] = round(100 * (ours / theirs[name] - 1), 2)
        values[f"{name}_ms"] = round(1e3 * ours, 3)
        values[f"{name}_measured_ms"] = round(1e3 * theirs[name], 3)
    return out | values
