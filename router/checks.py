"""Whether what a message says can be true, beyond what its types say; raises ProtocolError where it cannot. PURE.

One nonsensical number must not reach a placement policy: it would be met while another sender's message is handled.
"""

from __future__ import annotations

import math
from functools import lru_cache

import numpy as np
from msgspec.structs import astuple

from nexusengine.forecast.speed import REFERENCE_STEP, predictor_of
from nexusengine.kv.digest import Batch
from nexusengine.types import EngineRequest, TokenDelta
from nexusengine.wire import (
    MAX_DIGEST_BYTES,
    PROTOCOL_VERSION,
    PerfSnapshot,
    ProtocolError,
    WorkerInfo,
    WorkerLoad,
)

MAX_NAME_CHARS = 4096
MAX_COUNT = 2**31 - 1
MAX_TOKEN_ID = 2**31 - 1
MAX_STEP_S = 1e9


def wrong_version(protocol: int) -> str | None:
    """The refusal for a peer of another protocol version; None for one of ours."""
    if protocol == PROTOCOL_VERSION:
        return None
    return f"it speaks version {protocol} of the protocol, the router version {PROTOCOL_VERSION}"


def check_info(info: WorkerInfo) -> None:
    """Refuse what a worker says of itself if it cannot be true.

    Raises:
        ProtocolError: it cannot.
    """
    for name, value in zip(info.__struct_fields__, astuple(info), strict=True):
        if isinstance(value, str) and len(value) > MAX_NAME_CHARS:
            raise ProtocolError(f"{name} of a worker has {len(value)} characters")
        if isinstance(value, int | float) and not 0 <= value <= 2**53:
            raise ProtocolError(f"{name} of a worker is {value}")
    if not info.traits.step_s > 0.0:
        raise ProtocolError(f"a worker's steps are limited to {info.traits.step_s} s")


def check_load(load: WorkerLoad) -> None:
    """Refuse a worker's report if it cannot be true.

    Raises:
        ProtocolError: it cannot.
    """
    if load.tightest_tpot_s <= 0.0 or any(p.tpot_s <= 0.0 for p in load.pending):  # NaN: none
        raise ProtocolError("a report with a time per token that is not above 0")
    if load.perf is not None and (problem := _problem_of(load.perf)):
        raise ProtocolError(f"a report with a performance model that cannot be used: {problem}")


@lru_cache(maxsize=256)
def _problem_of(perf: PerfSnapshot) -> str | None:
    """Why a performance model cannot be used; None if it can. Cached, as a worker reports the same one for a while."""
    try:
        model = predictor_of(perf)
        f = REFERENCE_STEP
        sizes = np.array([1.0, f.tokens, 2.0**20])
        took_s = model.mean_s(sizes, np.ones(3), np.ones(3), np.full(3, f.prefill_attention), np.zeros(3))
    except (ValueError, ArithmeticError) as error:
        return str(error)
    within = bool(((took_s >= 0.0) & (took_s <= MAX_STEP_S)).all())
    return None if within else f"it predicts steps of {took_s.tolist()} s"


def check_digest(batches: tuple[Batch, ...]) -> None:
    """Refuse a digest of block hashes that is too large or malformed.

    Raises:
        ProtocolError: it is.
    """
    size = sum(len(hashes) for batch in batches for hashes in batch)
    if size > MAX_DIGEST_BYTES:
        raise ProtocolError(f"a digest of {size} bytes, over the limit of {MAX_DIGEST_BYTES}")
    if any(len(hashes) % 8 for batch in batches for hashes in batch):
        raise ProtocolError("a digest that cannot be read: its hashes are not of 8 bytes each")


def problem_of_request(request: EngineRequest) -> str | None:
    """Why a request is invalid; None if it can be placed. Whether the model can serve it is the worker's to check."""
    ids = request.prompt_token_ids
    if not ids or min(ids) < 0 or max(ids) > MAX_TOKEN_ID:
        return "its prompt is not a list of token ids"
    if len(request.request_id) > MAX_NAME_CHARS:
        return f"its id has {len(request.request_id)} characters; at most {MAX_NAME_CHARS} are taken"
    if not math.isfinite(request.arrival_s):
        return f"it arrived at {request.arrival_s}"
    if request.deadline_s is not None and math.isnan(request.deadline_s):
        return "its deadline is not a number"
    if not -(2**31) <= request.priority < 2**31:
        return f"its priority is {request.priority}"
    return None


def are_token_ids(ids: tuple[int, ...]) -> bool:
    """Whether these can be new tokens; none at all can."""
    if len(ids) == 1:
        return 0 <= ids[0] <= MAX_TOKEN_ID
    return not ids or 0 <= min(ids) <= max(ids) <= MAX_TOKEN_ID


def problem_of_delta(delta: TokenDelta) -> str | None:
    """Why a delta of new tokens is invalid; None if it can be passed on."""
    if not are_token_ids(delta.token_ids):
        return "a token id is out of range"
    if not 0 <= delta.cached_tokens <= MAX_COUNT or not 0 <= delta.preemptions <= MAX_COUNT:
        return "a count of it is out of range"
    if delta.finish_reason == "error" and not delta.error_code:
        return "it ends with an error that it does not name"
    if delta.retry_after_s is not None and not 0.0 <= delta.retry_after_s <= 1e9:
        return f"it asks to try again after {delta.retry_after_s} s"
    return None
