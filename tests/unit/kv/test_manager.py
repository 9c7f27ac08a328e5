"""The block pool: sharing, reuse, eviction, and the check that finds what is wrong."""

import pytest

from nexusengine.kv.hashing import block_hashes
from nexusengine.kv.manager import KVError, KVManager

SIZE = 4


def pool(blocks: int = 8, **options: bool) -> KVManager:
    return KVManager(blocks + 1, SIZE, max_slots=4, max_blocks_per_slot=16, **options)


def hashes(tokens: list[int]) -> list[bytes]:
    return block_hashes(tokens, SIZE, b"key")


def fill(kv: KVManager, slot: int, tokens: list[int]) -> int:
    cached = kv.admit(slot, hashes(tokens), len(tokens) - 1)
    assert kv.grow(slot, len(tokens))
    kv.commit(slot, hashes(tokens), len(tokens))
    kv.check()
    return cached


def test_hashes_are_chained_and_keyed_and_cover_full_blocks_only() -> None:
    a, b = block_hashes(range(10), SIZE, b"key"), block_hashes([9, *range(1, 10)], SIZE, b"key")
    assert len(a) == 2
    assert a[0] != b[0]
    assert a[1] != b[1], "the second block's name depends on the first"
    assert block_hashes(range(4, 8), SIZE, b"key", a[0]) == a[1:]
    assert block_hashes(range(10), SIZE, b"other") != a


def test_a_second_request_shares_the_blocks_of_an_equal_beginning() -> None:
    kv, tokens = pool(), list(range(10))
    assert fill(kv, 0, tokens) == 0
    assert fill(kv, 1, [*tokens[:8], 77, 78]) == 8
    assert kv.block_tables[0, :2].tolist() == kv.block_tables[1, :2].tolist()
    assert kv.used_blocks == 4


def test_at_least_one_token_is_left_to_compute() -> None:
    kv, tokens = pool(), list(range(8))
    fill(kv, 0, tokens)
    assert kv.lookup(hashes(tokens), len(tokens) - 1).tokens == 4


def test_released_blocks_are_found_again_until_they_are_needed_elsewhere() -> None:
    kv, tokens = pool(blocks=4), list(range(8))
    fill(kv, 0, tokens)
    kv.release(0)
    assert kv.free_blocks == 4
    assert kv.lookup(hashes(tokens), 8).free_blocks == 2
    fill(kv, 1, [50 + i for i in range(12)])
    assert kv.lookup(hashes(tokens), 8).tokens == 4, "the tail is evicted before the head"
    assert kv.evictions == 1


def test_growth_is_all_or_nothing() -> None:
    kv = pool(blocks=2)
    assert not kv.grow(0, 3 * SIZE)
    assert kv.blocks_of(0) == 0
    assert kv.grow(0, 2 * SIZE)
    kv.check()


def test_without_prefix_caching_nothing_is_shared() -> None:
    kv, tokens = pool(prefix_caching=False), list(range(8))
    fill(kv, 0, tokens)
    assert fill(kv, 1, tokens) == 0


def test_the_check_finds_a_tampered_table_and_a_lost_block() -> None:
    kv = pool()
    fill(kv, 0, list(range(8)))
    kv.block_tables[0, 1] = kv.block_tables[0, 0]
    with pytest.raises(KVError, match="users"):
        kv.check()
    kv = pool()
    kv._free.pop()
    with pytest.raises(KVError, match="lost"):
        kv.check()


def test_a_slot_that_holds_blocks_is_not_admitted_again() -> None:
    kv = pool()
    fill(kv, 0, list(range(8)))
    with pytest.raises(KVError, match="slot 0"):
        kv.admit(0, [], 0)


def test_discarded_blocks_are_found_by_nobody_even_while_others_still_hold_them() -> None:
    kv, tokens = pool(), list(range(10))
    fill(kv, 0, tokens)
    fill(kv, 1, tokens)
    kv.release(0, discard=True)
    kv.check()
    assert kv.lookup(hashes(tokens), 8).tokens == 0
    assert kv.used_blocks == 3
    kv.release(1)
    kv.check()
    assert kv.used_blocks == 0
    assert kv.lookup(hashes(tokens), 8).tokens == 0


def test_each_release_of_a_slot_is_counted() -> None:
    kv = pool()
    fill(kv, 1, list(range(6)))
    fill(kv, 2, list(range(6)))
    assert kv.releases.tolist() == [0, 0, 0, 0]
    kv.release(1)
    fill(kv, 1, list(range(9)))
    kv.release(1, discard=True)
    assert kv.releases.tolist() == [0, 2, 0, 0]
