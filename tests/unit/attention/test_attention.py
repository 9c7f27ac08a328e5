"""Every attention backend against plain attention in double precision, over a block table with poisoned slots.

The Triton kernels take part where there is a CUDA device, or where TRITON_INTERPRET=1 (scripts/test.sh runs this file
a second time so). The adapters of other libraries are in test_attention_adapters.
"""

from __future__ import annotations

import pytest
import torch

from nexusengine.attention.base import FP8, AttentionMeta, AttentionSpec
from nexusengine.attention.registry import backend_class, choose
from nexusengine.errors import ConfigError
from tests.support.attention_cases import BATCHES, HEADS, TOLERANCE, difference, make_case
from tests.support.pairwise import pairwise

NAMES = ("sdpa", "cpu", "triton")
DIMS = [64, 80, 128, 256]
SPLIT_TOO = {**BATCHES, "split": [(1, 300), (1, 40), (30, 90)]}


def usable(name: str, spec: AttentionSpec) -> None:
    """Skips the test, with the reason, where the backend cannot take the spec."""
    cls = backend_class(name)
    available, reason = cls.supports(spec)
    if available:
        available, reason = cls.probe()
    if available and spec.block_size not in cls.caps().block_sizes:
        available, reason = False, f"cannot use blocks of {spec.block_size}"
    if available and (spec.window or spec.soft_cap) and not cls.caps().modifiers:
        available, reason = False, "knows no windows and soft caps"
    if not available:
        pytest.skip(f"{name}: {reason}")


@pytest.mark.parametrize(("batch", "dim", "heads", "block_size"), pairwise([*BATCHES], DIMS, [*HEADS], [1, 16]))
@pytest.mark.parametrize("name", NAMES)
def test_a_backend_computes_attention(name: str, block_size: int, heads: str, dim: int, batch: str) -> None:
    spec = AttentionSpec(*HEADS[heads], dim, torch.float32, torch.device("cpu"), block_size, dim**-0.5)
    usable(name, spec)
    assert difference(backend_class(name)(spec), make_case(spec, BATCHES[batch])) < TOLERANCE[spec.dtype]


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("dim", [80, 128])
@pytest.mark.parametrize("name", NAMES)
def test_half_precision_is_as_close_as_it_can_be(name: str, dim: int, dtype: torch.dtype) -> None:
    spec = AttentionSpec(8, 2, dim, dtype, torch.device("cpu"), 16, dim**-0.5)
    usable(name, spec)
    assert difference(backend_class(name)(spec), make_case(spec, BATCHES["mixed"])) < TOLERANCE[dtype]


@pytest.mark.parametrize(("window", "soft_cap"), [(7, None), (40, None), (None, 2.0), (33, 5.0), (1, None)])
@pytest.mark.parametrize("name", NAMES)
def test_windows_and_soft_caps(name: str, window: int | None, soft_cap: float | None) -> None:
    spec = AttentionSpec(6, 2, 64, torch.float32, torch.device("cpu"), 16, 0.3, window, soft_cap)
    usable(name, spec)
    rows = [(1, 200), (1, 3), (150, 150), (40, 130), (3, 90)]
    assert difference(backend_class(name)(spec), make_case(spec, rows)) < TOLERANCE[spec.dtype]


@pytest.mark.parametrize(
    ("batch", "dim", "dtype"), pairwise([*SPLIT_TOO], [64, 80, 128], [torch.float32, torch.bfloat16])
)
@pytest.mark.parametrize("name", NAMES)
def test_attention_over_k_and_v_of_8_bits(name: str, dim: int, batch: str, dtype: torch.dtype) -> None:
    spec = AttentionSpec(8, 2, dim, dtype, torch.device("cpu"), 16, dim**-0.5, kv_dtype=FP8)
    if not backend_class(name).caps().fp8_cache:
        with pytest.raises(ConfigError, match=r"keep K and V in 8 bits here \(cpu: .*kv_cache_dtype at auto"):
            choose(spec, name)
        return
    usable(name, spec)
    assert difference(backend_class(name)(spec), make_case(spec, SPLIT_TOO[batch])) < TOLERANCE[dtype]


@pytest.mark.parametrize("name", ["sdpa", "triton"])
def test_numbers_too_large_for_8_bits_become_the_largest(name: str) -> None:
    spec = AttentionSpec(2, 2, 8, torch.float32, torch.device("cpu"), 4, 1.0, kv_dtype=FP8)
    usable(name, spec)
    caches = torch.zeros(2, 3, 4, 2, 8, dtype=FP8)
    one = torch.tensor([1], dtype=torch.int32)
    meta = AttentionMeta(one[None], one, torch.tensor([0, 1]), torch.tensor([6]), [1], [1], 1, 1, 1)
    large = torch.tensor([1e5, -1e5, 448.0, 500.0, 0.3, -0.001, 7.4, 0.0]).expand(1, 2, 8).contiguous()
    backend_class(name)(spec).store(large, -large, caches[0], caches[1], meta)
    stored = torch.tensor([448.0, -448.0, 448.0, 448.0, 0.3125, -0.001953125, 7.5, 0.0])
    assert torch.equal(caches[0, 1, 2].float(), stored.expand(2, 8))
    assert torch.equal(caches[1, 1, 2].float(), -stored.expand(2, 8))


def test_a_token_without_a_slot_is_stored_where_nobody_reads() -> None:
    spec = AttentionSpec(2, 2, 8, torch.float32, torch.device("cpu"), 4, 1.0)
    k_cache, v_cache = torch.zeros(3, 4, 2, 8), torch.zeros(3, 4, 2, 8)
    one = torch.tensor([1], dtype=torch.int32)
    meta = AttentionMeta(one[None], one, torch.tensor([0, 1]), torch.tensor([-1, 6]), [1], [1], 1, 1, 1)
    for name in ("sdpa", "triton"):
        if name == "triton" and not backend_class(name).probe()[0]:
            continue
        backend_class(name)(spec).store(torch.ones(2, 2, 8), torch.ones(2, 2, 8), k_cache, v_cache, meta)
        assert k_cache[1:].sum() == v_cache[1:].sum() == 16
        assert k_cache[1, 2].eq(1).all()


def test_a_backend_that_is_asked_for_and_cannot_run_is_an_error_with_the_reason() -> None:
    spec = AttentionSpec(2, 2, 8, torch.float64, torch.device("cpu"), 1, 1.0)
    with pytest.raises(ConfigError, match="float64"):
        choose(spec, "sdpa")
    with pytest.raises(ConfigError, match=r"unknown.*warp.*sdpa"):
        choose(spec, "warp")


def test_a_backend_that_knows_no_windows_is_passed_over_for_one() -> None:
    spec = AttentionSpec(2, 2, 8, torch.float32, torch.device("cpu"), 1, 1.0, window=4)
    with pytest.raises(ConfigError, match="windows"):
        choose(spec, "sdpa")
