"""Requests and workers as placement policies see them, for tests."""

from __future__ import annotations

from typing import Any

from nexusengine.perf import basis, online
from nexusengine.perf.curve import Curve
from nexusengine.router.placement.policy import PlacementRequest, WorkerView
from nexusengine.types import SLO
from nexusengine.wire import PendingPrefill, PerfSnapshot, WorkerInfo, WorkerLoad, WorkerState

INTERACTIVE = SLO(0.5, 0.05)
BATCH = SLO(30.0, 0.5)


def perf(speed: float = 1.0, quantile: float = 1.0) -> PerfSnapshot:
    """5 ms + 20 us a token + 1 ns a pair + 40 ns a KV token read, all divided by speed."""
    weights = [0.0] * basis.TERMS
    for term, seconds in ((basis.ONE, 0.005), (basis.SLOPE, 0.002), (basis.ATTENTION, 0.001), (basis.KV, 0.0004)):
        weights[term] = seconds / speed
    return PerfSnapshot(online.KIND, Curve(weights, 8192.0, quantile, quantile).numbers, quantile, 1000, 0)


def load(
    *, speed: float = 1.0, pending: tuple[PendingPrefill, ...] = (), decodes: int = 0, **fields: Any
) -> WorkerLoad:
    fields = {"kv_total_blocks": 10_000, "mean_output_tokens": 100.0, "last_dispatch_seq": 0} | fields
    return WorkerLoad(
        pending=pending,
        pending_tokens=sum(p.left_tokens for p in pending),
        running=decodes + len(pending),
        decodes=decodes,
        decode_kv_tokens=500 * decodes,
        tightest_tpot_s=0.05 if decodes else float("nan"),
        perf=perf(speed),
        **fields,
    )


def pending(due_s: float, left: int, done: int = 0, tpot_s: float = 0.05, relegated: bool = False) -> PendingPrefill:
    return PendingPrefill(due_s, left, done, tpot_s, relegated)


def view(name: str, report: WorkerLoad | None = None, /, **fields: Any) -> WorkerView:
    """A ready, idle worker unless the fields say otherwise."""
    info = fields.pop("info", None) or WorkerInfo(
        name, "e", 1, "cpu", "m", max_model_len=32_768, max_batch_tokens=2048, block_size=16
    )
    idle: dict[str, Any] = {"state": WorkerState.READY, "outstanding": 0, "outstanding_tokens": 0, "reported_s": 0.0}
    return WorkerView(info, load=report if report is not None else load(), **(idle | fields))


def request(name: str = "r", prompt: int = 500, slo: SLO | None = INTERACTIVE, **fields: Any) -> PlacementRequest:
    fields = {"max_tokens": 100, "arrival_s": 0.0, "deadline_s": 600.0} | fields
    return PlacementRequest(name, prompt, slo=slo, **fields)


def given_to(*requests: PlacementRequest, worker: str = "") -> dict[str, Any]:
    """The fields of a worker's view that the ledger fills, where it was sent these requests."""
    prompts = [r.prompt_tokens for r in requests]
    left = [r.prompt_tokens - r.cached_tokens.get(worker, 0) for r in requests]
    return {
        "outstanding": len(requests),
        "outstanding_tokens": sum(r.prompt_tokens + r.max_tokens for r in requests),
        "prompt_tokens": sum(prompts),
        "waiting_tokens": sum(left),
        "waiting_pairs": sum(q * (p - 0.5 * q) for p, q in zip(prompts, left, strict=True)),
    }
