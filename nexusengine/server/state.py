"""The state of the server: its configuration, how far start-up is, and the engine once there is one."""

from __future__ import annotations

import time
from dataclasses import dataclass, field
from typing import Any

from nexusengine.config import ServeConfig
from nexusengine.engine.async_engine import AsyncEngine
from nexusengine.errors import ModelNotFound, Unavailable
from nexusengine.loading.sampling_defaults import SAMPLED
from nexusengine.recording.keys import Keys
from nexusengine.server.heavy import Heavy
from nexusengine.server.metrics import Metrics
from nexusengine.server.recorder import Recorder
from nexusengine.server.schemas import ChatRequest, CompletionRequest
from nexusengine.slo.resolve import SLOClasses
from nexusengine.types import SamplingParams
from nexusengine.wire import Cluster, WorkerState

_RETRY_WHILE_STARTING_S = 2.0


@dataclass(slots=True)
class ServerState:
    """The state that requests share.

    Attributes:
        engine: None until the tokenizer is loaded; requests are served once a worker is ready.
        body_bytes: of bodies that are being received or parsed.
        recorder: None where no trace is recorded.
        keys: of the hashes that stand for tenants.
    """

    config: ServeConfig
    model_name: str
    engine: AsyncEngine | None = None
    phase: str = "starting"
    fraction: float = 0.0
    draining: bool = False
    was_ready: bool = False
    in_progress: int = 0
    body_bytes: int = 0
    recorder: Recorder | None = None
    heavy: Heavy = field(default_factory=Heavy)
    started_unix_s: int = field(default_factory=lambda: int(time.time()))
    metrics: Metrics = field(init=False)
    classes: SLOClasses = field(init=False)
    keys: Keys = field(default_factory=Keys)

    def __post_init__(self) -> None:
        self.classes = SLOClasses.configured(self.config.slo_classes, self.config.default_slo_class)
        self.metrics = Metrics(self.cluster, self.classes.by_name)
        if self.recorder is not None:
            self.keys = self.recorder.keys
            self.recorder.start(self.cluster, self.metrics.recorded)

    def cluster(self) -> Cluster | None:
        return None if self.engine is None else self.engine.backend.status()

    @property
    def ready(self) -> bool:
        """Whether a request sent now would be served."""
        cluster = self.cluster()
        ready = cluster is not None and any(w.state is WorkerState.READY for w in cluster.workers)
        self.was_ready |= ready
        return ready and not self.draining

    def serving_engine(self) -> AsyncEngine:
        """The engine, if requests can be served now.

        A moment without a ready worker is waited out by the router, once there has been one.

        Raises:
            Unavailable: while starting and while draining.
        """
        if self.draining:
            raise Unavailable("the server is shutting down", retry_after_s=5.0)
        if self.engine is None or not (self.ready or self.was_ready):
            raise Unavailable(f"the server is starting: {self.phase}", retry_after_s=_RETRY_WHILE_STARTING_S)
        return self.engine

    def with_model_defaults(self, body: ChatRequest | CompletionRequest) -> SamplingParams:
        """The sampling of a request, with the model's own defaults where it names nothing. Raises InvalidRequest."""
        params = body.sampling()
        if self.engine is None or self.config.generation_config == "none":
            return params
        defaults = self.engine.tokenizer.sampling_defaults
        return defaults.fill(params, [name for name in SAMPLED if getattr(body, name) is not None])

    def check_model(self, name: str | None) -> None:
        """Raises ModelNotFound if the request names a model that is not served here."""
        if name is not None and name != self.model_name:
            raise ModelNotFound(f"the model {name!r} is not served here; this is {self.model_name!r}", param="model")

    def progress(self) -> dict[str, Any]:
        """The reply of /startupz."""
        cluster = self.cluster()
        workers = [
            {
                "id": w.info.worker_id,
                "device": w.info.device,
                "pid": w.info.pid,
                "restarts": w.restarts,
                "state": w.state.value,
                "phase": w.phase,
                "fraction": round(w.fraction, 3),
                **({"cause": w.cause} if w.cause else {}),
            }
            for w in (cluster.workers if cluster else ())
        ]
        ready = self.ready
        phase = "draining" if self.draining else "ready" if ready else self.phase
        return {"phase": phase, "fraction": 1.0 if ready else round(self.fraction, 3), "workers": workers}
