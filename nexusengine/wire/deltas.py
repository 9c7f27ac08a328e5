"""Token deltas as they travel: most are an id and a few integers."""

from __future__ import annotations

from collections.abc import Iterable

from nexusengine.types import TokenDelta

PlainDelta = tuple[str, tuple[int, ...]]
"""Request id and new token ids of a request that goes on."""

Split = tuple[tuple[PlainDelta, ...], tuple[TokenDelta, ...]]


def split_deltas(deltas: Iterable[TokenDelta]) -> Split:
    """Deltas as the (plain, full) of WorkerDeltas and Deltas: most tokens travel as an id and a few integers."""
    plain: list[PlainDelta] = []
    full: list[TokenDelta] = []
    for delta in deltas:
        if delta.finish_reason is None and delta.logprobs is None and delta.timings is None and delta.service is None:
            plain.append((delta.request_id, delta.token_ids))
        else:
            full.append(delta)
    return tuple(plain), tuple(full)


def join_deltas(plain: Iterable[PlainDelta], full: Iterable[TokenDelta]) -> list[TokenDelta]:
    """The inverse of `split_deltas`, plain ones first."""
    return [TokenDelta(request_id, token_ids) for request_id, token_ids in plain] + list(full)
