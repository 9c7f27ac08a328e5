"""Replays a measured run of vLLM: its requests, its settings, its own policy, durations from a device profile.

What is simulated beside the policy and the KV cache, because measured latencies contain it:
- Requests are taken in between steps, and steps are planned one ahead (see `pipelined`): a first token comes at the
  end of the step after next.
- With experts, data-parallel engines step together: each layer waits for the slowest, exchanges activations twice, and
  computes the experts for the tokens of all.
- A step with a prompt chunk runs outside the one CUDA graph of decode steps, and its matrix products at the clocks of
  sustained load instead of a burst's. Both are small; see HOST.
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
from nexusengine.sim.vllm_run import BLOCK_TOKENS, Measured, Sent, VllmSettings

_NEVER = float("inf")
_STATS_EVERY_S = 0.1
_OWN_NAMES, _OWN_NAMES_EACH = 2**40, 2**20

Batch = tuple[np.ndarray, np.ndarray]
"""Counts and contexts of a step, row by row."""


@dataclass(frozen=True, slots=True)
class Host:
    """What a step with a prompt chunk takes beyond its kernels one by one: launch_s, and a factor."""

    launch_s: float
    sustained: float


HOST = Host(0.001, 1.02)
"""Estimated from the 300-request run of Llama-3.1-8B on the RTX PRO 6000 (docs/profiles.md), used for all."""


@dataclass(frozen=True, slots=True)
class Replayed:
    """simulated: as measured. steps: of all engines; preemptions, cached_tokens: counted over all."""

    simulated: Measured
    steps: int
    preemptions: int
    cached_tokens: int


def step_cost(profile: DeviceProfile, engines: int, link: Link | None, host: Host) -> Callable[[list[Batch]], float]:
    """Seconds of a step that `engines` compute together, of which some may have nothing to do."""

    def alone(batches: list[Batch]) -> float:
        counts, contexts = batches[0]
        return profile.step_s(counts, contexts)

    def together(batches: list[Batch]) -> float:
        assert isinstance(profile, ComposedProfile)
        assert profile.experts is not None
        assert link is not None
        sizes = [int(counts.sum()) for counts, _ in batches]
        own = max(
            profile.dense(size) + profile.attention_s(counts, contexts, size) + profile.head(len(counts))
            for size, (counts, contexts) in zip(sizes, batches, strict=True)
        )
        exchange = 2 * profile.layers * link.seconds(2 * profile.hidden * max(sizes))
        return own + profile.experts.seconds(engines)(sum(sizes)) + exchange

    kernels = alone if engines == 1 else together

    def cost(batches: list[Batch]) -> float:
        mixed = any(int(counts.max()) > 1 for counts, _ in batches)
        return kernels(batches) * host.sustained + host.launch_s if mixed else kernels(batches)

    return cost


class Lane:
    """Engines that step together: one, or the data-parallel ones of a model with experts."""

    def __init__(self, engines: Sequence[PipelinedEngine], cost: Callable[[list[Batch]], float]) -> None:
        self.engines, self._cost = engines, cost
        self.inboxes: list[list[Job]] = [[] for _ in engines]
        self.queued_s: dict[str, float] = {}
        self.until_s = _NEVER
        self.steps = 0

    def step(self, now: float) -> None:
        """The step under way has ended, or the lane was idle and something came."""
        batches: list[Batch] = []
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


def replay(profile: DeviceProfile, sent: Sequence[Sent], settings: VllmSettings, host: Host = HOST) -> Replayed:
    """Raises ConfigError where the run cannot be simulated: a request that does not fit, or parts not measured."""
    lanes, engines = _lanes(profile, sent, settings, host)
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


def _lanes(
    profile: DeviceProfile, sent: Sequence[Sent], settings: VllmSettings, host: Host
) -> tuple[list[Lane], list[PipelinedEngine]]:
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
    engines = [
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
    experts = isinstance(profile, ComposedProfile) and profile.experts is not None
    if len(engines) > 1 and experts:
        if profile.identity.device not in LINKS:
            raise ConfigError(f"nothing is known of what {profile.identity.device} devices exchange and how fast")
        return [Lane(engines, step_cost(profile, len(engines), LINKS[profile.identity.device], host))], engines
    return [Lane([engine], step_cost(profile, 1, None, host)) for engine in engines], engines


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


def compare(simulated: Measured, measured: Measured) -> dict[str, float]:
    """Signed errors in percent of mean, p50, p90 and p99: `ttft_mean_pct` and so on.

    Beside them the values in milliseconds, `ttft_mean_ms` simulated and `ttft_mean_measured_ms`.
    """
    out: dict[str, float] = {}
    values: dict[str, float] = {}
    statistics: dict[str, Callable[[Any], Any]] = {
        "mean": np.nanmean,
        "p50": np.nanmedian,
        "p90": lambda v: np.nanquantile(v, 0.9),
        "p99": lambda v: np.nanquantile(v, 0.99),
    }
    for what in ("ttft", "tpot", "e2e"):
        ours, theirs = getattr(simulated, f"{what}_s"), getattr(measured, f"{what}_s")
        for name, statistic in statistics.items():
            a, b = float(statistic(ours)), float(statistic(theirs))
            out[f"{what}_{name}_pct"] = round(100 * (a / b - 1), 2)
            values[f"{what}_{name}_ms"] = round(1e3 * a, 3)
            values[f"{what}_{name}_measured_ms"] = round(1e3 * b, 3)
    return out | values
