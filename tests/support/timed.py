"""An engine core on virtual time: an executor whose steps take what a formula says, and requests at their times."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np

from nexusengine.clock import VirtualClock
from nexusengine.core.engine_core import EngineCore
from nexusengine.execute.base import ExecutorSpec
from nexusengine.execute.batch import StepBatch, StepResult
from nexusengine.perf.features import StepFeatures
from nexusengine.perf.registry import make_model
from nexusengine.scheduler.registry import make_policy
from nexusengine.types import SLO, EngineRequest, SamplingParams, Service, Timings
from nexusengine.worker.calibrate import calibrate

StepSeconds = Callable[[StepFeatures, float], float]
"""Duration of a step, from its features and the timestamp at which it begins."""


class TimedExecutor:
    """Computes nothing; every token is 1. Steps take what `seconds` says."""

    def __init__(self, clock: VirtualClock, seconds: StepSeconds, max_batch_tokens: int = 2048) -> None:
        self.spec = ExecutorSpec(
            device="timed",
            dtype="float32",
            block_size=16,
            num_blocks=8192,
            max_model_len=8192,
            max_batch_tokens=max_batch_tokens,
            vocab_size=100,
            attention_backend="none",
            weights_bytes=0,
            kv_bytes=0,
        )
        self._clock, self._seconds = clock, seconds
        self._results: deque[StepResult] = deque()

    def submit(self, batch: StepBatch) -> None:
        took_s = self._seconds(StepFeatures.of(batch.counts, batch.starts), self._clock.now())
        self._clock.advance(took_s)
        self._results.append(StepResult(np.ones(int(batch.sampled.sum()), np.int32), took_s))

    def collect(self) -> StepResult:
        return self._results.popleft()

    def close(self) -> None:
        pass


@dataclass(frozen=True, slots=True)
class Arrival:
    """A request: when it comes, its tokens, and its SLO."""

    at_s: float
    prompt_tokens: int
    output_tokens: int = 24
    slo: SLO | None = None


@dataclass(frozen=True, slots=True)
class Served:
    """What became of one."""

    arrival: Arrival
    service: Service
    timings: Timings

    @property
    def error(self) -> float | None:
        """Of its predicted TTFT, relative to the measured one; None if nothing was predicted."""
        predicted_s, ttft_s = self.service.predicted_ttft_s, self.timings.ttft_s
        assert ttft_s is not None
        return None if predicted_s is None else predicted_s / ttft_s - 1.0


class TimedCore:
    """An engine core as a worker makes it, calibrated, that serves arrivals one load after the other."""

    def __init__(self, seconds: StepSeconds, policy: str = "lens", *, calibrate_s: float = 2.0) -> None:
        self.clock = VirtualClock()
        executor, model = TimedExecutor(self.clock, seconds), make_model()
        self.core = EngineCore(
            executor, make_policy(policy), model, clock=self.clock, hash_key=b"k", prefix_caching=False
        )
        calibrate(executor, model, max_running=256, seconds=calibrate_s, timer=self.clock.now)
        self._count = 0

    def serve(self, arrivals: Sequence[Arrival]) -> list[Served]:
        """Serve all of a load; at_s of each counts from now."""
        began_s, core, clock = self.clock.now(), self.core, self.clock
        waiting = deque(sorted(arrivals, key=lambda a: a.at_s))
        by_id: dict[str, Arrival] = {}
        served: list[Served] = []
        while waiting or core.has_work:
            if not core.has_work:
                clock.advance(max(began_s + waiting[0].at_s - clock.now(), 0.0))
            while waiting and began_s + waiting[0].at_s <= clock.now():
                arrival = waiting.popleft()
                self._count += 1
                name = f"r{self._count}"
                by_id[name] = arrival
                sampling = SamplingParams(temperature=0.0, max_tokens=arrival.output_tokens, seed=0)
                at_s = began_s + arrival.at_s
                core.add(EngineRequest(name, [1] * arrival.prompt_tokens, sampling, at_s, slo=arrival.slo))
            served += [
                Served(by_id[d.request_id], d.service, d.timings)
                for d in core.step()
                if d.finish_reason == "length" and d.service is not None and d.timings is not None
            ]
        return served
