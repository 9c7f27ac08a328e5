"""Load over time: samples of a simulation, for plots."""

from __future__ import annotations

from dataclasses import dataclass

from nexusengine.sim.cluster import Cluster

_SAMPLES = 600


@dataclass(frozen=True, slots=True)
class Sample:
    """At one time: by worker, jobs running and waiting and the share of KV in use; held: by the router."""

    at_s: float
    running: tuple[int, ...]
    waiting: tuple[int, ...]
    kv: tuple[float, ...]
    held: int


class Sampler:
    """Takes some hundred samples over the time in which requests arrive, and goes on at that pace."""

    def __init__(self, duration_s: float) -> None:
        self.period_s = max(duration_s / _SAMPLES, 0.05)
        self.samples: list[Sample] = []

    def __call__(self, now: float, cluster: Cluster) -> None:
        engines = [w.engine for w in cluster.workers]
        self.samples.append(
            Sample(
                now,
                tuple(e.running for e in engines),
                tuple(e.waiting for e in engines),
                tuple(e.kv.used_blocks / e.kv.total_blocks for e in engines),
                cluster.core.ledger.held,
            )
        )
