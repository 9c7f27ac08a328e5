"""A router's core driven message by message, for its tests."""

from __future__ import annotations

from typing import Any

from nexusengine import wire
from nexusengine.router.core import RouterCore
from nexusengine.router.placement.policy import PlacementPolicy
from nexusengine.router.placement.registry import make_policy
from nexusengine.types import EngineRequest, SamplingParams, TokenDelta
from nexusengine.wire import identity_of

CLIENT = b"client"


def info(worker: str, epoch: str = "e1", longest: int = 1000) -> wire.WorkerInfo:
    return wire.WorkerInfo(worker, epoch, 1, "cpu", "m", max_model_len=longest)


class Router:
    """A core with its outgoing messages sorted by receiver."""

    def __init__(self, *workers: str, policy: str | PlacementPolicy = "least-requests", **options: Any) -> None:
        chosen = make_policy(policy) if isinstance(policy, str) else policy
        self.core = RouterCore(chosen, [info(w, "") for w in workers], epoch="r", **options)
        self.now = 0.0

    def ready(self, worker: str, epoch: str = "e1") -> None:
        self.core.on_worker(identity_of(worker, epoch), wire.Ready(info(worker, epoch)), self.now)

    def submit(self, name: str, prompt: int = 10, max_tokens: int = 5, deadline_s: float | None = None) -> None:
        sampling = SamplingParams(seed=1, max_tokens=max_tokens)
        request = EngineRequest(name, [1] * prompt, sampling, self.now, deadline_s=deadline_s)
        self.core.on_client(CLIENT, wire.Submit(request), self.now)

    def deltas(self, worker: str, *deltas: TokenDelta, epoch: str = "e1") -> None:
        message = wire.WorkerDeltas(*wire.split_deltas(deltas))
        self.core.on_worker(identity_of(worker, epoch), message, self.now)

    def sent(self) -> dict[bytes, list[wire.Message]]:
        out: dict[bytes, list[wire.Message]] = {}
        for o in self.core.take():
            if not isinstance(o.message, wire.Cluster):
                out.setdefault(o.identity, []).append(o.message)
        return out

    def dispatched(self) -> dict[str, str]:
        """Request id -> worker id of the dispatches since the last look."""
        return {
            m.request.request_id: identity.decode().split(".")[0]
            for identity, messages in self.sent().items()
            for m in messages
            if isinstance(m, wire.Dispatch)
        }

    def finals(self) -> dict[str, str]:
        """Request id -> finish reason or error code of the ends since the last look."""
        return {
            d.request_id: d.error_code or d.finish_reason or ""
            for m in self.sent().get(CLIENT, [])
            if isinstance(m, wire.Deltas)
            for d in wire.join_deltas(m.plain, m.full)
            if d.finish_reason
        }
