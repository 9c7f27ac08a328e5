"""The description, load and state of a worker: the numbers that placements are made from."""

from __future__ import annotations

from enum import StrEnum
from typing import Annotated, Literal

import msgspec
from msgspec import Meta

from nexusengine.wire.base import MAX_PENDING_IN_REPORT, Count, Seconds


class WorkerState(StrEnum):
    """Whether a worker serves.

    Attributes:
        STARTING: loading its model.
        READY: takes requests.
        STALLED: a step takes far longer than predicted.
        GONE: its process ended or was silent for too long.
    """

    STARTING = "starting"
    READY = "ready"
    STALLED = "stalled"
    GONE = "gone"


class PendingPrefill(msgspec.Struct, frozen=True, array_like=True):
    """A prompt that is not fully computed.

    Attributes:
        deadline_s: monotonic timestamp at which its first token is due; infinite without an SLO.
        left_tokens, done_tokens: to compute, and computed.
    """

    deadline_s: float
    left_tokens: Count
    done_tokens: Count
    tpot_s: float
    relegated: bool


class PerfSnapshot(msgspec.Struct, frozen=True, array_like=True):
    """Enough to rebuild the same step-time predictor in another process, with `perf.registry.rebuild`.

    Attributes:
        kind: which model.
        weights: its parameters, in that model's own order and units (documented there).
        quantile: factor from mean to upper bound.
        steps: observations learned from.
        epoch: rises when drift was accepted.
    """

    kind: str
    weights: Annotated[tuple[float, ...], Meta(max_length=1024)]
    quantile: Annotated[float, Meta(gt=0.0, le=1e6)]
    steps: Count = 0
    epoch: Count = 0


class WorkerLoad(msgspec.Struct, frozen=True, array_like=True):
    """The load of a worker at one time.

    Attributes:
        last_dispatch_seq: the last dispatch (by `Dispatch.seq`) whose effect is included here.
        step, step_running_s: number of the newest step, and how long it has been running; 0 between steps.
        step_upper_s: upper bound predicted for its duration.
        tightest_tpot_s: of the decodes; NaN without one.
        pending: at most MAX_PENDING_IN_REPORT, earliest deadline first, relegated ones after all others.
        counters: since the worker started, by metric name (see server.metrics).
        relegated, relegated_tokens: how many are relegated, and their tokens left.
    """

    last_dispatch_seq: Count
    running: Count = 0
    waiting: Count = 0
    kv_used_blocks: Count = 0
    kv_total_blocks: Count = 0
    step: Count = 0
    step_running_s: Seconds = 0.0
    step_upper_s: Seconds = 0.0
    decodes: Count = 0
    decode_kv_tokens: Count = 0
    tightest_tpot_s: float = float("nan")
    pending: Annotated[tuple[PendingPrefill, ...], Meta(max_length=MAX_PENDING_IN_REPORT)] = ()
    pending_tokens: Count = 0
    mean_output_tokens: Annotated[float, Meta(ge=0.0, le=1e12)] = 0.0
    perf: PerfSnapshot | None = None
    counters: Annotated[dict[str, float], Meta(max_length=1024)] = {}
    relegated: Count = 0
    relegated_tokens: Count = 0


class PolicyTraits(msgspec.Struct, frozen=True, array_like=True):
    """The behaviour of an engine policy, as far as others must predict its steps; each policy declares its own.

    Attributes:
        order: which prompts it serves first, by the "deadline" of their first token, as of their "arrival", or those
            with the "shortest" rest.
        relegates: whether prompts that cannot be in time go behind all others.
        step_tokens: most tokens of a step; 0 for the engine's own limit.
        step_s: no step is planned longer than so many seconds; infinite if there is no such bound.
        by_tpot: whether steps are kept within the tightest TPOT of those that decode.
    """

    order: Literal["deadline", "arrival", "shortest"] = "deadline"
    relegates: bool = True
    step_tokens: Count = 0
    step_s: float = float("inf")
    by_tpot: bool = True


class WorkerInfo(msgspec.Struct, frozen=True, array_like=True):
    """The description of a worker; 0 and "" where something is not known yet.

    Attributes:
        worker_id: stable over restarts ("w0").
        epoch: unique for each process.
        scheduler, traits: name of its engine policy, for people, and what it declares.
        max_waiting: requests that may wait in it; more are refused.
        max_running: most sequences of a step.
    """

    worker_id: str
    epoch: str
    pid: int
    device: str
    model: str
    dtype: str = ""
    attention_backend: str = ""
    max_model_len: int = 0
    max_batch_tokens: int = 0
    block_size: int = 0
    kv_total_blocks: int = 0
    weights_bytes: int = 0
    kv_bytes: int = 0
    scheduler: str = ""
    max_waiting: int = 0
    traits: PolicyTraits = PolicyTraits()
    max_running: Count = 0


class WorkerStatus(msgspec.Struct, frozen=True, array_like=True):
    """A worker as the router sees it.

    Attributes:
        outstanding: requests dispatched and not finished, from the router's ledger.
        ejected: why it gets no requests although it is ready; None if it does.
    """

    info: WorkerInfo
    state: WorkerState
    phase: str
    fraction: float
    outstanding: int
    load: WorkerLoad | None
    restarts: int = 0
    cause: str | None = None
    ejected: str | None = None
