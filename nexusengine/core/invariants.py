"""What must hold between the core's requests and the scheduler's columns after every step."""

from __future__ import annotations

from collections.abc import Collection, Mapping

from nexusengine.core.delivery import Delivery
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
    delivery: Delivery,
    max_model_len: int,
    hash_key: bytes,
) -> None:
    """Raises InternalError naming the first invariant that does not hold."""
    c, size = scheduler.columns, scheduler.kv.block_size
    if {s.request.request_id: s for s in scheduler.requests.values()} != by_id:
        raise InternalError("the scheduler has other requests than the core")
    for slot, state in scheduler.requests.items():
        known, generated, unknown = (
            int(c.known_tokens[slot]),
            int(c.generated_tokens[slot]),
            int(delivery.pending[slot]),
        )
        if known != len(state.tokens) + unknown or known > max_model_len:
            raise InternalError(
                f"slot {slot}: {known} tokens in its column, {len(state.tokens)} in its state and {unknown} pending"
            )
        if state.output_tokens + unknown != generated:
            raise InternalError(f"slot {slot}: {state.output_tokens} output tokens of {generated}")
        steps = sum(any(s is state for s in step.states) for step in in_flight)
        if not 0 <= unknown <= steps or (slot in scheduler.ending) != (generated == state.max_tokens):
            raise InternalError(f"slot {slot}: {unknown} tokens pending, in {steps} steps in flight")
        if delivery.newest[slot] != (PENDING if unknown else state.tokens[-1]):
            raise InternalError(f"slot {slot}: its newest token is not the one the next step would compute")
        if state.block_hashes != block_hashes(state.tokens[: len(state.block_hashes) * size], size, hash_key):
            raise InternalError(f"slot {slot}: its block hashes are not those of its tokens")
