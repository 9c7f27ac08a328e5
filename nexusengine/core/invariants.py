"""What must hold between the core's requests and the scheduler's columns after every step."""

from __future__ import annotations

from collections.abc import Collection, Mapping

from nexusengine.arrays import I4
from nexusengine.core.in_flight import InFlightStep
from nexusengine.core.request import RequestState
from nexusengine.errors import InternalError
from nexusengine.execute.batch import PENDING
from nexusengine.kv.hashing import block_hashes
from nexusengine.scheduler.scheduler import Scheduler


def check_requests(
    scheduler: Scheduler[RequestState],
    by_id: Mapping[str, RequestState],
    in_flight: Collection[InFlightStep],
    last_token: I4,
    max_model_len: int,
    hash_key: bytes,
) -> None:
    """Raises InternalError naming the first invariant that does not hold."""
    c, size = scheduler.columns, scheduler.kv.block_size
    if {s.request.request_id: s for s in scheduler.requests.values()} != by_id:
        raise InternalError("the scheduler has other requests than the core")
    for slot, state in scheduler.requests.items():
        known, generated = int(c.known_tokens[slot]), int(c.generated_tokens[slot])
        if known != state.known + state.pending or known > max_model_len:
            raise InternalError(
                f"slot {slot}: {known} tokens in its column, {state.known} and {state.pending} pending in its state"
            )
        if state.output_tokens + state.pending != generated:
            raise InternalError(f"slot {slot}: {state.output_tokens} output tokens of {generated}")
        steps = sum(any(s is state for s in step.states) for step in in_flight)
        if not 0 <= state.pending <= steps or (slot in scheduler.ending) != (generated == state.max_tokens):
            raise InternalError(f"slot {slot}: {state.pending} tokens pending, in {steps} steps in flight")
        if last_token[slot] != (PENDING if state.pending else state.tokens[known - 1]):
            raise InternalError(f"slot {slot}: its newest token is not the one the next step would compute")
        if state.block_hashes != block_hashes(state.tokens[: len(state.block_hashes) * size], size, hash_key):
            raise InternalError(f"slot {slot}: its block hashes are not those of its tokens")
