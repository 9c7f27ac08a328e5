"""How the router follows what the workers' prefix caches hold."""

from __future__ import annotations

import msgspec
import pytest

from nexusengine import wire
from nexusengine.kv.digest import pack, short_hashes
from nexusengine.router.core import RouterCore
from nexusengine.router.placement.registry import make_policy
from nexusengine.types import EngineRequest, SamplingParams, Timings, TokenDelta
from nexusengine.wire import identity_of
from tests.support.router_driver import Router, info


def names(request: EngineRequest, block_size: int) -> list[bytes]:
    ids = request.prompt_token_ids
    return [bytes([ids[0]]) * 8 + i.to_bytes(8, "little") for i in range(len(ids) // block_size)]


def with_prefixes(policy: str, *workers: str) -> Router:
    router = Router()
    router.core = RouterCore(make_policy(policy), [], epoch="r", block_hashes=names)
    for w in workers:
        who = msgspec.structs.replace(info(w, longest=100_000), block_size=16)
        router.core.on_worker(identity_of(w, "e1"), wire.Ready(who), 0.0)
    return router


def tell_digest(router: Router, worker: str, seq: int, blocks: int, *, first: int = 1, digest_seq: int = 0) -> None:
    request = EngineRequest("", [first] * 16 * blocks, SamplingParams(), 0.0)
    packed = pack(short_hashes(names(request, 16), 16))
    digest = wire.PrefixDigest(0, digest_seq, ((packed, b""),))
    report = wire.Report(seq, wire.WorkerLoad(0), digest)
    router.core.on_worker(identity_of(worker, "e1"), report, router.now)


@pytest.mark.parametrize("policy", ["prism", "cache-aware", "lmetric"])
def test_requests_go_where_their_beginning_is_cached_and_hits_are_compared_with_what_was_believed(policy: str) -> None:
    router = with_prefixes(policy, "w0", "w1", "w2")
    tell_digest(router, "w1", 1, 100)
    for n in range(4):
        router.submit(f"a{n}", prompt=1610)
    assert set(router.dispatched().values()) == {"w1"}
    first = TokenDelta("a0", (5,), cached_tokens=1584, timings=Timings(0.0))
    router.deltas("w1", first)
    router.deltas("w1", TokenDelta("a0", (6,)))
    counters = router.core.cluster().counters
    assert (counters["prefix_prompt_tokens"], counters["prefix_predicted_tokens"]) == (1610, 1600)
    assert (counters["prefix_hit_tokens"], counters["prefix_error_tokens"]) == (1584, 16)
    router.core.on_worker_exited("w1", "e1", "killed", 1, 0.0)
    assert len(router.core.prefixes) == 0


def test_a_digest_with_a_gap_is_asked_for_anew_and_an_absurd_one_is_an_error() -> None:
    router = with_prefixes("prism", "w0")
    tell_digest(router, "w0", 1, 10)
    router.sent()
    tell_digest(router, "w0", 2, 10, digest_seq=5)
    assert router.sent() == {identity_of("w0", "e1"): [wire.RepeatPrefixes()]}
    for wrong in (b"123", b"x" * 8 * 5000):
        report = wire.Report(3, wire.WorkerLoad(0), wire.PrefixDigest(0, 1, ((wrong, b""),)))
        with pytest.raises(wire.ProtocolError, match="digest"):
            router.core.on_worker(identity_of("w0", "e1"), report, 0.0)


def test_prefixes_are_not_looked_up_for_a_policy_that_does_not_ask() -> None:
    router = with_prefixes("least-requests", "w0")
    tell_digest(router, "w0", 1, 10)
    router.submit("a", prompt=200)
    assert router.core.ledger.get("a").prefix == {}  # type: ignore[union-attr]


def test_what_a_worker_was_given_is_known_without_its_reports() -> None:
    router = with_prefixes("prism", "w0")
    tell_digest(router, "w0", 1, 20)

    def given() -> tuple[int, int, int, float]:
        view = router.core.workers.views(router.core.ledger)[0]
        return view.outstanding, view.prompt_tokens, view.waiting_tokens, view.waiting_pairs

    router.submit("a", prompt=330)
    router.submit("b", prompt=330)
    assert given() == (2, 660, 20, 2 * 10 * (330 - 5))
    router.deltas("w0", TokenDelta("a", (5,), cached_tokens=320, timings=Timings(0.0)))
    assert given() == (2, 660, 10, 10 * (330 - 5))
    router.deltas("w0", TokenDelta("a", (6,)), TokenDelta("b", finish_reason="length"))
    assert given() == (1, 330, 0, 0.0)
    router.deltas("w0", TokenDelta("a", finish_reason="length"))
    assert given() == (0, 0, 0, 0.0)
