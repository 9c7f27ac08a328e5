"""Which tokens the router passes on without a further look."""

from __future__ import annotations

import pytest

from nexusengine import wire
from nexusengine.router.ledger import Ledger
from nexusengine.router.streaming import goes_on
from nexusengine.types import EngineRequest, SamplingParams, TokenDelta

HERE, ELSEWHERE = b"w0.e1", b"w1.e1"


def ledger(*names: str, streaming: bool = True) -> Ledger:
    """Requests of two clients in turns, the n-th with dispatch number n + 1 at a worker."""
    made = Ledger()
    for n, name in enumerate(names):
        entry = made.add(EngineRequest(name, [1], SamplingParams(max_tokens=9), 0.0), b"client%d" % (n % 2))
        made.dispatch(entry, HERE, n + 1)
        if streaming:
            made.streams(entry)
    return made


def test_tokens_of_requests_that_stream_go_to_their_clients_as_they_are() -> None:
    plain = (("a", (5,)), ("b", (6, 7)), ("c", ()))
    streaming, others = goes_on(wire.WorkerDeltas(plain), HERE, ledger("a", "b", "c"))
    assert streaming == {b"client0": [plain[0], plain[2]], b"client1": [plain[1]]}
    assert others == []


@pytest.mark.parametrize(
    ("token_ids", "identity", "last_dispatch_seq", "known", "streaming"),
    [
        ((5,), HERE, 9, False, True),
        ((5,), HERE, 9, True, False),
        ((5,), ELSEWHERE, 9, True, True),
        ((5,), HERE, 0, True, True),
        ((-1,), HERE, 9, True, True),
        ((2**31,), HERE, 9, True, True),
        ((5, -1), HERE, 9, True, True),
    ],
    ids=["unknown", "first token", "of another worker", "of an attempt before", "negative", "too large", "one wrong"],
)
def test_all_others_are_looked_at(
    token_ids: tuple[int, ...], identity: bytes, last_dispatch_seq: int, known: bool, streaming: bool
) -> None:
    message = wire.WorkerDeltas((("a", token_ids),), (), last_dispatch_seq)
    found = goes_on(message, identity, ledger("a" if known else "b", streaming=streaming))
    assert found == ({}, [TokenDelta("a", token_ids)])
