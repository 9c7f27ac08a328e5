"""Sampling at the edges of its parameters and over large vocabularies."""

from __future__ import annotations

import dataclasses

import numpy as np
import pytest
import torch

from nexusengine.sampling.noise import exponential, row_keys
from nexusengine.sampling.sampler import sample
from tests.unit.sampling.test_sampler import allowed, rows


@pytest.mark.parametrize("temperature", [1e-45, 1e-38, 1e-30, 1e-6, 1e-5, 1e-3])
@pytest.mark.parametrize("top_p", [1.0, 0.9])
def test_a_temperature_near_zero_is_greedy_and_does_not_overflow(temperature: float, top_p: float) -> None:
    torch.manual_seed(0)
    logits = torch.randn(20, 3000) * 30
    tokens, _ = sample(logits, rows(20, temperature=temperature, top_p=top_p, seed=np.arange(20)))
    assert tokens.tolist() == logits.argmax(-1).tolist()


def test_a_very_high_temperature_is_uniform() -> None:
    logits = torch.randn(1, 10).expand(20_000, -1).contiguous()
    tokens, _ = sample(logits, rows(20_000, temperature=1e4, seed=np.arange(20_000)))
    counts = np.bincount(tokens.numpy(), minlength=10)
    assert ((counts - 2000) ** 2 / 2000).sum() < 9 + 5 * 18**0.5


@pytest.mark.parametrize("columns", [{"top_k": 1}, {"top_p": 1e-6}, {"min_p": 1.0}, {"top_k": 1, "min_p": 1.0}])
def test_the_narrowest_filter_leaves_the_most_likely_token(columns: dict[str, float]) -> None:
    torch.manual_seed(1)
    logits = torch.randn(50, 2000)
    tokens, _ = sample(logits, rows(50, temperature=5.0, seed=np.arange(50), **columns))
    assert tokens.tolist() == logits.argmax(-1).tolist()


@pytest.mark.parametrize("top_k", [1500, 3000, 100_000])
def test_a_top_k_beyond_the_first_candidates_keeps_exactly_so_many(top_k: int) -> None:
    """A flat distribution over 3,000 tokens: every kept token is equally likely, so that a cut would show."""
    n = 1000
    logits = torch.linspace(0, 1e-4, 3000).expand(n, -1).contiguous()
    tokens, _ = sample(logits, rows(n, top_k=top_k, seed=np.arange(n)))
    kept = min(top_k, 3000)
    assert tokens.min() >= 3000 - kept
    assert tokens.min() < 3000 - kept + 40, "the least likely token that is kept is drawn sometimes"


def test_a_flat_nucleus_reaches_past_the_first_candidates() -> None:
    """top_p 0.9 of 4,000 nearly equal tokens keeps 3,600 of them."""
    n = 1000
    logits = torch.linspace(0, 1e-3, 4000).expand(n, -1).contiguous()
    tokens, _ = sample(logits, rows(n, top_p=0.9, seed=np.arange(n)))
    assert 395 <= tokens.min() < 440


def test_filters_keep_what_the_slow_reference_keeps() -> None:
    """Random settings, a vocabulary larger than the candidates; every token drawn must be allowed."""
    rng = np.random.default_rng(3)
    torch.manual_seed(3)
    logits = torch.randn(60, 2500) * 3
    columns = rows(
        60,
        temperature=rng.uniform(0.3, 2.0, 60),
        top_k=rng.choice([0, 1, 20, 1024, 1025, 2400], 60),
        top_p=rng.choice([0.1, 0.5, 0.95, 0.999, 1.0], 60),
        min_p=rng.choice([0.0, 0.01, 0.3], 60),
    )
    for attempt in range(20):
        drawn, _ = sample(logits, dataclasses.replace(columns, seed=np.arange(60) + 1000 * attempt))
        for row, token in enumerate(drawn.tolist()):
            settings = (float(getattr(columns, f)[row]) for f in ("temperature", "top_k", "top_p", "min_p"))
            temperature, top_k, top_p, min_p = settings
            assert token in allowed(logits[row], temperature, int(top_k), top_p, min_p)


def test_whether_a_neighbour_needs_the_whole_vocabulary_changes_nothing() -> None:
    torch.manual_seed(4)
    logits = torch.randn(2, 3000)
    logits[1] *= 0.01
    pair = rows(2, top_p=[0.5, 0.99], seed=[7, 8])
    alone = [sample(logits[i : i + 1], pair.gather(np.array([i])))[0].item() for i in range(2)]
    assert sample(logits, pair)[0].tolist() == alone


def test_a_broken_row_does_not_change_the_filtered_rows_beside_it() -> None:
    torch.manual_seed(5)
    logits = torch.randn(3, 3000)
    columns = rows(3, top_p=0.9, top_k=[0, 5, 0], seed=[1, 2, 3], logprobs=2)
    expected = sample(logits, columns)[0].tolist()
    logits[1] = torch.nan
    assert sample(logits, columns)[0].tolist() == [expected[0], -1, expected[2]]


def test_half_of_all_bits_differ_between_neighbouring_counters() -> None:
    """Seeds, positions and token ids that differ by one bit or by one give unrelated numbers."""
    ids = torch.arange(20_000, dtype=torch.int32)

    def bits(seed: int, position: int, shift: int = 0) -> np.ndarray:
        noise = exponential(row_keys(np.array([seed]), np.array([position], np.int32)), ids + shift)
        uniform = -torch.expm1(-noise.double())[0].numpy()
        found: np.ndarray = (uniform[:, None] * 2.0 ** np.arange(1, 13)).astype(np.int64) & 1
        return found

    start = bits(1, 1)
    for other in (bits(2, 1), bits(1, 2), bits(2, 2), bits(1, 1, 1), bits(-1, 1), bits(1 + 2**62, 1)):
        assert np.abs((start != other).mean(axis=0) - 0.5).max() < 0.02
    assert np.abs(start.mean(axis=0) - 0.5).max() < 0.02


@pytest.mark.parametrize("key", [0, 1])
def test_either_half_of_a_rows_key_changes_every_number(key: int) -> None:
    """Rows whose keys agree in one half are as unrelated as any: neither equal nor shifted."""
    keys = torch.full((2, 2), 12345, dtype=torch.int32)
    keys[1, key] += 1
    noise = exponential(keys, torch.arange(20_000, dtype=torch.int32))
    uniform = -torch.expm1(-noise.double())
    apart = ((uniform[0] - uniform[1]) % 1.0).numpy()
    counts = np.histogram(apart, bins=50, range=(0, 1))[0]
    assert ((counts - 400) ** 2 / 400).sum() < 49 + 5 * 98**0.5
