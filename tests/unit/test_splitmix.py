"""splitmix64: its published outputs, alike for one number and for arrays."""

from __future__ import annotations

from collections import Counter

import numpy as np

from nexusengine.splitmix import GOLDEN, MASK_64, splitmix64, splitmix64_array


def test_outputs_are_those_of_the_reference_implementation() -> None:
    """The first five of seed 1234567, as published for https://prng.di.unimi.it/splitmix64.c."""
    expected = [
        6457827717110365317,
        3203168211198807973,
        9817491932198370423,
        4593380528125082431,
        16408922859458223821,
    ]
    assert [splitmix64(1234567, n) for n in range(5)] == expected


def test_arrays_give_what_single_numbers_give() -> None:
    seeds = [0, 7, 2**63, MASK_64]
    for counter in (0, 1, 1000):
        with np.errstate(over="ignore"):
            states = np.array(seeds, np.uint64) + np.uint64(counter * GOLDEN & MASK_64)
            found = splitmix64_array(states)
        assert found.tolist() == [splitmix64(seed, counter) for seed in seeds]


def test_outputs_are_even_over_their_range() -> None:
    buckets = Counter(splitmix64(7, n) % 10 for n in range(10_000))
    assert min(buckets.values()) > 900
    assert max(buckets.values()) < 1100
