"""A worker's prefix cache and the router's picture of it, through batches that are lost, repeated and overtaken."""

from __future__ import annotations

from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, rule

from nexusengine.kv.digest import (
    MAX_HASHES_IN_BATCH,
    Batch,
    CacheEvents,
    DigestSender,
    digest_stride,
    pack,
    short_hash,
    short_hashes,
    unpack,
)
from nexusengine.kv.manager import KVManager
from nexusengine.router.prefix import ASK_AGAIN_AFTER_S, PrefixIndex
from nexusengine.wire import MAX_DIGEST_BYTES

BLOCK = 16
STRIDE = digest_stride(BLOCK)


def names_of(family: int, blocks: int) -> list[bytes]:
    return [bytes([family]) * 8 + i.to_bytes(8, "little") for i in range(blocks)]


class Picture(RuleBasedStateMachine):
    """One worker with a small cache, so that much is evicted; sent: messages that have not come yet."""

    def __init__(self) -> None:
        super().__init__()
        self.kv = KVManager(40, BLOCK, 4, 30)
        self.kv.events = CacheEvents(BLOCK)
        self.sender = DigestSender(self.kv.events)
        self.index = PrefixIndex()
        self.now = 0.0
        self.sent: list[tuple[int, int, tuple[Batch, ...]]] = []

    @rule(slot=st.integers(0, 3), family=st.integers(0, 3), blocks=st.integers(1, 25), discard=st.booleans())
    def serve(self, slot: int, family: int, blocks: int, discard: bool) -> None:
        names = names_of(family, blocks)
        self.kv.admit(slot, names, blocks * BLOCK - 1)
        if self.kv.grow(slot, blocks * BLOCK):
            self.kv.commit(slot, names, blocks * BLOCK)
        self.kv.release(slot, discard=discard and family == 0)

    @rule(lost=st.sampled_from([False, False, True]))
    def send(self, lost: bool) -> None:
        message = self.sender.take()
        assert sum(len(part) for batch in message[2] for part in batch) <= MAX_DIGEST_BYTES
        if not lost:
            self.sent.append(message)

    @rule()
    def receive(self) -> None:
        if self.sent:
            self.follow(self.sent.pop(0))

    @rule()
    def the_router_is_restarted(self) -> None:
        self.index = PrefixIndex()
        self.sent.clear()
        self.sender.start_over()

    def follow(self, message: tuple[int, int, tuple[Batch, ...]]) -> None:
        self.now += ASK_AGAIN_AFTER_S
        if not self.index.follow("w", *message, self.now):
            self.sender.start_over()

    def teardown(self) -> None:
        """Once messages come again, the picture is what is there."""
        for _ in range(3):
            self.sent.append(self.sender.take())
            while self.sent:
                self.follow(self.sent.pop(0))
        assert self.kv.events is not None
        there = {short_hash(n) for n in self.kv._block_of if int.from_bytes(n[8:], "little") % STRIDE == STRIDE - 1}
        assert all(self.index.shared([name], BLOCK) == {"w": STRIDE * BLOCK} for name in there)
        assert len(self.index) == len(there)
        for family in range(4):
            names = names_of(family, 25)
            hit = self.kv.lookup(names, 25 * BLOCK).tokens // (STRIDE * BLOCK) * (STRIDE * BLOCK)
            believed = self.index.shared(short_hashes(names, BLOCK), BLOCK).get("w", 0)
            assert believed >= hit, "what is cached from the beginning on is believed to be"
        self.index.forget("w")
        assert len(self.index) == 0


TestPicture = Picture.TestCase
TestPicture.settings = settings(max_examples=60, stateful_step_count=50, deadline=None)


@given(st.dictionaries(st.sampled_from("abcdefg"), st.integers(0, 40), max_size=7), st.integers(0, 40))
def test_every_workers_share_of_a_prompt_is_found(held: dict[str, int], length: int) -> None:
    index, names = PrefixIndex(), list(range(1000, 1040))
    for worker, blocks in held.items():
        assert index.follow(worker, 0, 0, ((pack([*names[:blocks], ord(worker)]), b""),), 0.0)
    tokens = STRIDE * BLOCK
    expected = {w: min(n, length) * tokens for w, n in held.items() if min(n, length)}
    assert index.shared(names[:length], BLOCK) == expected


def test_a_cache_larger_than_a_batch_is_told_in_several() -> None:
    events = CacheEvents(64)
    sender, index = DigestSender(events), PrefixIndex()
    names = [i.to_bytes(16, "little") for i in range(3 * MAX_HASHES_IN_BATCH)]
    for i, name in enumerate(names):
        events.added(name, i)
    for told in (1, 2, 3, 3):
        assert index.follow("w", *sender.take(), 0.0)
        assert len(index) == told * MAX_HASHES_IN_BATCH
    assert sender.take()[2][-1] == (b"", b"")


def test_two_lost_messages_are_made_up_for_by_the_third_and_three_by_a_new_round() -> None:
    events = CacheEvents(64)
    sender, index = DigestSender(events), PrefixIndex()
    index.follow("w", *sender.take(), 0.0)
    for i in range(9):
        events.added(i.to_bytes(8, "little"), 0)
        message = sender.take()
        if i in (2, 5):  # of two lost batches each
            assert index.follow("w", *message, 0.0)
            assert len(index) == i + 1
        elif i == 8:
            break
    for _ in range(3):
        message = sender.take()
    assert not index.follow("w", *message, 0.0), "it is to be asked to start over"
    assert index.follow("w", *sender.take(), 0.5), "but not again at once"
    assert not index.follow("w", *sender.take(), 1.5), "only after a while"
    assert len(index) == 6, "until then what was known stays"
    sender.start_over()
    assert index.follow("w", *sender.take(), 2.0)
    assert len(index) == 9


def test_names_survive_packing() -> None:
    assert unpack(pack([0, 1, 2**64 - 1])) == [0, 1, 2**64 - 1]
    assert len({short_hash(i.to_bytes(12, "little")) for i in range(1 << 62, (1 << 62) + 1000)}) == 1000
    assert len({short_hash(((s << 64) + 5).to_bytes(12, "little")) for s in range(1000)}) == 1000
