"""Every kernel compiles for every architecture, with the settings it would be launched with there, and fits.

NEXUSENGINE_COMPILE=full compiles every head dimension for every architecture and type; by default every architecture
and type at one head dimension, and the largest one where there is least shared memory.
"""

from __future__ import annotations

import os
from pathlib import Path

import pytest
import torch

pytest.importorskip("triton")

from nexusengine.triton_kernels import (
    activation,
    attention,
    decode_attention,
    fp8,
    launch,
    norm,
    prefill_attention,
    rope,
    sampling,
)

from .offline import Recorder

pytestmark = pytest.mark.skipif(launch.interpreted(), reason="TRITON_INTERPRET=1 is set: nothing is compiled")
ARCHITECTURES = [(8, 0), (8, 9), (9, 0), (10, 0), (12, 0)]
HALF = [torch.float16, torch.bfloat16]
FULL = os.environ.get("NEXUSENGINE_COMPILE") == "full"
DIMENSIONS = (
    [(c, t, d) for c in [(7, 5), *ARCHITECTURES] for t in [*HALF, torch.float32] for d in (64, 80, 128, 256)]
    if FULL
    else [(c, t, 128) for c in ARCHITECTURES for t in HALF] + [((8, 9), torch.float16, 256)]
)
DIMENSIONS = [(c, t, d) for c, t, d in DIMENSIONS if c >= (8, 0) or t != torch.bfloat16]

FP8 = [(c, t, d) for c, t, d in DIMENSIONS if c >= (8, 9) and t != torch.float32]


@pytest.fixture
def recorder(
    request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> tuple[Recorder, tuple[int, int]]:
    """request.param: a compute capability. Nothing compiled before is taken from a cache."""
    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path))
    monkeypatch.setenv("TRITON_DEFAULT_FP_FUSION", "1")
    made = Recorder(request.param)
    monkeypatch.setattr(launch, "launch", made)
    return made, request.param


@pytest.mark.parametrize(("recorder", "dtype", "dim"), DIMENSIONS, indirect=["recorder"])
def test_attention_compiles_and_fits(recorder: tuple[Recorder, tuple[int, int]], dtype: torch.dtype, dim: int) -> None:
    compile_attention(recorder, dtype, dim, dtype)


@pytest.mark.parametrize(("recorder", "dtype", "dim"), FP8, indirect=["recorder"])
def test_attention_over_a_cache_of_8_bits_compiles_and_fits(
    recorder: tuple[Recorder, tuple[int, int]], dtype: torch.dtype, dim: int
) -> None:
    compile_attention(recorder, dtype, dim, torch.float8_e4m3fn)


def compile_attention(
    recorder: tuple[Recorder, tuple[int, int]], dtype: torch.dtype, dim: int, kept: torch.dtype
) -> None:
    record, capability = recorder
    shape = attention.Shape(32, 8, dim, 16, 0.1, window=64 if dim == 80 else 0, soft_cap=3.0 if dim == 80 else 0.0)
    q, cache = torch.zeros(40, 32, dim, dtype=dtype), torch.zeros(4, 16, 8, dim, dtype=kept)
    table, lengths, starts = (torch.zeros(n, dtype=torch.int32) for n in (8 * 64, 8, 9))
    table = table.view(8, 64)
    decode_attention.decode(q[:4], cache, cache, table[:4], lengths[:4], q[:4], shape, 4, 256, capability)
    if FULL:
        decode_attention.decode(q[:4], cache, cache, table[:4], lengths[:4], q[:4], shape, 1, 256, capability)
    prefill_attention.prefill(q, cache, cache, table, lengths, starts, q, shape, 4, capability)
    assert set(record.shared) == {"_decode_kernel", "_merge_kernel", "_prefill_kernel"}
    assert max(record.shared.values()) <= launch.shared_bytes(capability), record.shared


@pytest.mark.parametrize("dtype", HALF)
@pytest.mark.parametrize("recorder", ARCHITECTURES, indirect=True)
def test_the_other_kernels_compile_and_fit(recorder: tuple[Recorder, tuple[int, int]], dtype: torch.dtype) -> None:
    record, capability = recorder
    x = torch.zeros(4, 4096, dtype=dtype)
    norm.rms_norm(x, x[0], 1e-5)
    activation.silu_mul(x)
    cache, positions = torch.zeros(4, 16, 8, 128, dtype=dtype), torch.zeros(4, dtype=torch.long)
    qkv, cos = torch.zeros(4, 48 * 128, dtype=dtype), torch.zeros(64, 64, dtype=dtype)
    rope.rotate_and_store(qkv, cos, cos, positions, positions, cache, cache, (32, 8, 128))
    rope.store(cache[0, :4], cache[0, :4], cache, cache, positions)
    if dtype == HALF[0]:  # logits are float32 whatever the model's type
        parameters = torch.zeros(4, 6, dtype=torch.int32)
        sampling.sample(torch.zeros(4, 1000), parameters)
    assert len(record.shared) == (5 if dtype == HALF[0] else 4)
    assert max(record.shared.values()) <= launch.shared_bytes(capability), record.shared


@pytest.mark.parametrize("dtype", HALF)
@pytest.mark.parametrize("recorder", [c for c in ARCHITECTURES if c >= (8, 9)], indirect=True)
def test_what_8_bit_floats_need_compiles_and_fits(
    recorder: tuple[Recorder, tuple[int, int]], dtype: torch.dtype
) -> None:
    """Both tiles of the product, with and without a bias, and the store into the cache."""
    record, capability = recorder
    x, weight = torch.zeros(40, 4096, dtype=dtype), torch.zeros(512, 4096, dtype=torch.float8_e4m3fn)
    fp8.quantize(x)
    fp8.block_linear(x, weight, torch.zeros(4, 32))
    fp8.block_linear(x[:4], weight, torch.zeros(4, 32), x[0, :512])
    cache, positions = torch.zeros(4, 16, 8, 128, dtype=torch.float8_e4m3fn), torch.zeros(4, dtype=torch.long)
    qkv, cos = torch.zeros(4, 48 * 128, dtype=dtype), torch.zeros(64, 64, dtype=dtype)
    rope.rotate_and_store(qkv, cos, cos, positions, positions, cache, cache, (32, 8, 128))
    rope.store(qkv[:, : 8 * 128].view(4, 8, 128), qkv[:, : 8 * 128].view(4, 8, 128), cache, cache, positions)
    names = {"_quantize_kernel", "_block_linear_kernel", "_rotate_and_store_kernel", "_store_kernel"}
    assert set(record.shared) == names
    assert max(record.shared.values()) <= launch.shared_bytes(capability), record.shared
