"""The sampling kernel in the interpreter: the tokens torch's way takes, row for row."""

from __future__ import annotations

import numpy as np
import pytest
import torch

pytest.importorskip("triton")

from nexusengine.sampling.noise import exponential, row_keys
from nexusengine.sampling.sampler import _sample_by_torch, sample
from nexusengine.sampling.table import SamplingRows
from nexusengine.triton_kernels import launch
from tests.unit.sampling.test_sampler import CASES, rows

pytestmark = pytest.mark.skipif(not launch.interpreted(), reason="needs TRITON_INTERPRET=1")


def alike(logits: torch.Tensor, columns: SamplingRows) -> None:
    found, _ = sample(logits, columns)
    expected, _ = _sample_by_torch(logits, columns)
    assert found.tolist() == expected.tolist()


@pytest.mark.parametrize(("temperature", "top_k", "top_p", "min_p"), [*CASES, (0.8, 1000, 0.999, 0.0), (1.0, 1, 1, 0)])
def test_the_kernel_draws_what_torch_draws(temperature: float, top_k: int, top_p: float, min_p: float) -> None:
    torch.manual_seed(1)
    n = 12
    columns = rows(n, temperature=temperature, top_k=top_k, top_p=top_p, min_p=min_p, seed=np.arange(n))
    alike(torch.randn(n, 600) * 2, columns)


def test_rows_of_all_kinds_go_together() -> None:
    torch.manual_seed(2)
    n = 24
    kinds = np.arange(n) % 6
    columns = rows(
        n,
        temperature=np.where(kinds == 0, 0.0, 0.9),
        top_k=np.where(kinds == 1, 7, 0),
        top_p=np.where(kinds == 2, 0.6, 1.0),
        min_p=np.where(kinds == 3, 0.3, 0.0),
        seed=np.arange(n) * 2**40 - 5,
        position=np.arange(n) * 1000,
    )
    logits = torch.randn(n, 1300) - 4
    logits[4, 9] = 0.0
    logits[5, 3], logits[7, 1299], logits[8, 0] = torch.nan, torch.inf, -torch.inf
    alike(logits, columns)
    found, _ = sample(logits, columns)
    assert [found[i].item() for i in (5, 7, 8)] == [-1, -1, -1]
    for i in range(0, n, 5):
        alone = columns.gather(np.array([i]))
        assert sample(logits[i : i + 1], alone)[0].item() == found[i].item()


def test_of_tokens_that_tie_with_the_last_one_kept_those_of_the_lowest_ids_are_kept() -> None:
    logits = torch.tensor([[3.0, 1.0, 2.0, 2.0, 2.0, -1.0, 0.0, -0.0]]).expand(60, -1).contiguous()
    for top_k, expected in ((1, {0}), (2, {0, 2}), (3, {0, 2, 3}), (5, {0, 1, 2, 3, 4}), (7, {0, 1, 2, 3, 4, 6, 7})):
        columns = rows(60, temperature=3.0, top_k=top_k, seed=np.arange(60))
        drawn, _ = sample(logits, columns)
        assert set(drawn.tolist()) == expected
        alike(logits, columns)
    all_equal = rows(1, temperature=0.0)
    assert sample(torch.zeros(1, 600), all_equal)[0].tolist() == [0]


@pytest.mark.parametrize(
    ("top_k", "top_p"), [(5, 1.0), (300, 1.0), (0, 0.3), (0, 0.9), (40, 0.5), (2, 0.99), (599, 0.95)]
)
def test_rows_full_of_ties_are_drawn_as_torch_draws_them(top_k: int, top_p: float) -> None:
    """As bfloat16 makes them; their probabilities are far from a filter's edge."""
    torch.manual_seed(3)
    n = 24
    logits = torch.randint(-2, 3, (n, 600)).float()
    alike(logits, rows(n, temperature=1.5, top_k=top_k, top_p=top_p + 1e-5 * (top_p < 1), seed=np.arange(n)))


def test_the_noise_is_that_of_the_definition() -> None:
    """Where all logits are equal the winner is the token of the least noise."""
    n = 30
    keys = row_keys(np.arange(n, dtype=np.int64), np.full(n, 17, np.int32))
    expected = exponential(keys, torch.arange(3000, dtype=torch.int32)).argmin(-1)
    found, _ = sample(torch.zeros(n, 3000), rows(n, seed=np.arange(n), position=17))
    assert (found == expected).all()


def test_logprobs_of_a_broken_row_do_no_harm() -> None:
    logits = torch.randn(2, 50)
    logits[0, 0] = torch.nan
    tokens, logprobs = sample(logits, rows(2, logprobs=2))
    assert logprobs is not None
    assert tokens[0] == -1
    chosen = logits[1].log_softmax(-1)[tokens[1]]
    assert torch.allclose(logprobs.chosen[1], chosen)
