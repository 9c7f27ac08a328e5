"""A simulated worker process: its engines, one after each crash, and its load reports."""

from __future__ import annotations

from collections.abc import Callable

from nexusengine.kv.digest import CacheEvents, DigestSender
from nexusengine.sim.engine import SimEngine
from nexusengine.wire import PrefixDigest, Report, WorkerInfo, identity_of

EPOCH = "sim"


class SimWorker:
    """A worker's place in the event queue, and the engines it has had: a new one after each crash."""

    def __init__(self, index: int, make_engine: Callable[[], SimEngine]) -> None:
        self.index, self._make_engine = index, make_engine
        self.engines = [make_engine()]
        self.slowdown = 1.0
        self.version = 0
        self.report_seq = 0
        self.up = True
        self._describe()

    @property
    def engine(self) -> SimEngine:
        return self.engines[-1]

    @property
    def restarts(self) -> int:
        return len(self.engines) - 1

    def restart(self) -> None:
        self.engines.append(self._make_engine())
        self.engine.slowdown = self.slowdown
        self.report_seq = 0
        self._describe()

    def report(self, now: float) -> Report:
        """Its load, and what has changed in its prefix cache."""
        self.report_seq += 1
        digest = None if self.prefixes is None else PrefixDigest(*self.prefixes.take())
        return Report(self.report_seq, self.engine.load(now), digest)

    def _describe(self) -> None:
        e = self.engine
        self.info = WorkerInfo(
            worker_id=f"w{self.index}",
            epoch=f"{EPOCH}{self.restarts}",
            pid=0,
            device=e.profile.identity.device,
            model=e.profile.identity.model,
            max_model_len=e.max_model_len,
            max_batch_tokens=e.settings.max_batch_tokens,
            block_size=e.settings.block_size,
            kv_total_blocks=e.kv.total_blocks,
            weights_bytes=e.profile.identity.weights_bytes,
            scheduler=e.policy.name,
            max_waiting=e.settings.max_waiting,
            traits=e.policy.traits,
            max_running=e.settings.max_running,
        )
        self.identity = identity_of(self.info.worker_id, self.info.epoch)
        self.prefixes: DigestSender | None = None
        if e.settings.prefix_caching:
            e.kv.events = CacheEvents(e.settings.block_size)
            self.prefixes = DigestSender(e.kv.events)
