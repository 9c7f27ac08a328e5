"""Keyed hashes: the same within a key, without meaning outside of it."""

from __future__ import annotations

from itertools import pairwise

from hypothesis import given
from hypothesis import strategies as st

from nexusengine.recording.format import LARGEST_COUNT
from nexusengine.recording.keys import Keys

IDS = st.lists(st.integers(0, 150_000), max_size=100)


@given(ids=IDS, more=IDS, size=st.integers(1, 32))
def test_ids_are_equal_exactly_as_far_as_the_tokens_are(ids: list[int], more: list[int], size: int) -> None:
    keys = Keys("0123456789abcdef")
    one, both = keys.blocks(ids, size), keys.blocks(ids + more, size)
    assert len(one) == len(ids) // size
    assert both[: len(one)] == one
    assert all(0 <= i < LARGEST_COUNT for i in both)
    other = keys.blocks([ids[0] + 1, *ids[1:]] if ids else [], size)
    assert not set(other) & set(one)
    assert all(a != b for a, b in pairwise(both))


def test_another_key_gives_other_hashes_and_a_key_of_ones_own_the_same_again() -> None:
    ids = list(range(64))
    assert not set(Keys().blocks(ids, 16)) & set(Keys().blocks(ids, 16))
    assert Keys("a" * 16).blocks(ids, 16) == Keys("a" * 16).blocks(ids, 16)
    assert Keys("a" * 16).tenant("user", "bob") == Keys("a" * 16).tenant("user", "bob")
    assert Keys("a" * 16).tenant("user", "bob") != Keys("b" * 16).tenant("user", "bob")
    assert Keys("a" * 16).tenant("user", "bob") != Keys("a" * 16).tenant("key", "bob")
