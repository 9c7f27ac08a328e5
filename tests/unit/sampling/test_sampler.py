"""Sampling: the right distribution, the right filters, and the same draw whatever else is in the batch."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from nexusengine.sampling.noise import exponential, row_keys
from nexusengine.sampling.sampler import sample
from nexusengine.sampling.table import SamplingRows


def rows(n: int, **columns: float | list[float] | np.ndarray) -> SamplingRows:
    """n rows; a column is one value for all or one for each."""
    defaults: dict[str, tuple[float, type]] = {
        "temperature": (1.0, np.float32),
        "top_k": (0, np.int32),
        "top_p": (1.0, np.float32),
        "min_p": (0.0, np.float32),
        "seed": (0, np.int64),
        "logprobs": (-1, np.int32),
        "position": (0, np.int32),
    }
    made: dict[str, np.ndarray] = {
        name: np.broadcast_to(np.asarray(columns.get(name, value), kind), n).copy()
        for name, (value, kind) in defaults.items()
    }
    return SamplingRows(**made)


def allowed(logits: torch.Tensor, temperature: float, top_k: int, top_p: float, min_p: float) -> dict[int, float]:
    """Slow reference: token -> probability after the filters, one at a time."""
    p = (logits.double() / temperature).softmax(-1).tolist()
    order = sorted(range(len(p)), key=lambda i: -p[i])
    if top_k:
        order = order[:top_k]
    total, seen = sum(p[i] for i in order), 0.0
    kept: list[int] = []
    for i in order:
        if seen < top_p * total or not kept:
            kept.append(i)
        seen += p[i]
    kept = [i for i in kept if p[i] >= min_p * p[order[0]]]
    mass = sum(p[i] for i in kept)
    return {i: p[i] / mass for i in kept}


CASES = [
    (1.0, 0, 1.0, 0.0),
    (0.5, 0, 1.0, 0.0),
    (2.0, 5, 1.0, 0.0),
    (1.0, 0, 0.7, 0.0),
    (1.0, 8, 0.8, 0.0),
    (1.0, 0, 1.0, 0.2),
    (1.3, 12, 0.95, 0.1),
]


@pytest.mark.parametrize(("temperature", "top_k", "top_p", "min_p"), CASES)
@pytest.mark.parametrize("candidates", [1024, 4])
def test_draws_follow_the_filtered_distribution(
    monkeypatch: pytest.MonkeyPatch, candidates: int, temperature: float, top_k: int, top_p: float, min_p: float
) -> None:
    """Chi-square over 20,000 draws; with 4 candidates the whole vocabulary must be looked at."""
    monkeypatch.setattr("nexusengine.sampling.sampler._CANDIDATES", candidates)
    torch.manual_seed(1)
    logits, n = torch.randn(40) * 2, 20_000
    columns = rows(n, temperature=temperature, top_k=top_k, top_p=top_p, min_p=min_p, seed=np.arange(n))
    tokens, _ = sample(logits.expand(n, -1).contiguous(), columns)
    expected = allowed(logits, temperature, top_k, top_p, min_p)
    counts = np.bincount(tokens.numpy(), minlength=40)
    assert set(np.nonzero(counts)[0].tolist()) <= set(expected)
    likely = [i for i, p in expected.items() if p * n >= 5]
    chi2 = sum((counts[i] - expected[i] * n) ** 2 / (expected[i] * n) for i in likely)
    freedom = max(len(likely) - 1, 1)
    assert chi2 < freedom + 5 * (2 * freedom) ** 0.5


def test_a_draw_depends_on_seed_and_position_only() -> None:
    torch.manual_seed(2)
    logits = torch.randn(6, 500)
    columns = rows(
        6, seed=[1, 1, 2, 3, 4, 5], position=[7, 8, 7, 7, 7, 7], top_p=[1, 1, 1, 0.9, 1, 1], top_k=[0, 0, 0, 0, 9, 0]
    )
    together, _ = sample(logits, columns)
    for i in range(6):
        alone, _ = sample(logits[i : i + 1], columns.gather(np.array([i])))
        assert alone.item() == together[i].item()
    same = logits[:1].expand(300, -1).contiguous()
    assert len(set(sample(same, rows(300, seed=np.arange(300)))[0].tolist())) > 50
    assert len(set(sample(same, rows(300, position=np.arange(300)))[0].tolist())) > 50


def test_temperature_zero_takes_the_most_likely_token() -> None:
    torch.manual_seed(3)
    logits = torch.randn(5, 100)
    tokens, _ = sample(logits, rows(5, temperature=0.0, top_k=3, top_p=0.5))
    assert tokens.tolist() == logits.argmax(-1).tolist()


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), float("-inf")])
def test_a_row_that_is_not_finite_is_marked_and_the_others_are_not(bad: float) -> None:
    torch.manual_seed(4)
    logits = torch.randn(3, 50)
    expected, _ = sample(logits, rows(3, seed=9))
    logits[1, 7] = bad
    tokens, _ = sample(logits, rows(3, seed=9))
    assert tokens.tolist() == [expected[0].item(), -1, expected[2].item()]


def test_logprobs_are_those_of_the_raw_distribution() -> None:
    torch.manual_seed(5)
    logits = torch.randn(3, 50)
    tokens, logprobs = sample(logits, rows(3, temperature=0.3, top_k=2, seed=[1, 2, 3], logprobs=[-1, 0, 4]))
    assert logprobs is not None
    expected = logits.log_softmax(-1)
    assert np.allclose(logprobs.chosen, expected.gather(1, tokens[:, None])[:, 0], atol=1e-6)
    assert logprobs.top_ids[2].tolist() == expected[2].topk(4).indices.tolist()
    assert np.allclose(logprobs.top[2], expected[2].topk(4).values, atol=1e-6)


def test_noise_is_exponential_and_never_zero() -> None:
    keys = row_keys(np.arange(64, dtype=np.int64), np.zeros(64, np.int32))
    noise = exponential(keys, torch.arange(5000, dtype=torch.int32))
    assert noise.min() > 0
    assert abs(noise.mean().item() - 1) < 0.01
    assert abs(noise.var().item() - 1) < 0.03
    correlation = np.corrcoef(noise.numpy())
    assert np.abs(correlation - np.eye(64)).max() < 0.08
