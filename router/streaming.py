"""The tokens that the router passes on with no more than a look: those of requests that stream already. PURE."""

from __future__ import annotations

from collections import defaultdict

from nexusengine.router.checks import are_token_ids
from nexusengine.router.ledger import Ledger, Stage
from nexusengine.types import TokenDelta
from nexusengine.wire import PlainDelta, WorkerDeltas


def goes_on(
    message: WorkerDeltas, identity: bytes, ledger: Ledger
) -> tuple[dict[bytes, list[PlainDelta]], list[TokenDelta]]:
    """Sort the plain deltas of a worker process.

    Returns:
        By client, those that can be passed on as they are; and all others.
    """
    streaming: dict[bytes, list[PlainDelta]] = defaultdict(list)
    others: list[TokenDelta] = []
    for item in message.plain:
        request_id, token_ids = item
        entry = ledger.get(request_id)
        if (
            entry is not None
            and entry.stage is Stage.STREAMING
            and entry.identity == identity
            and entry.seq <= message.last_dispatch_seq
            and are_token_ids(token_ids)
        ):
            streaming[entry.client].append(item)
        else:
            others.append(TokenDelta(request_id, token_ids))
    return streaming, others
