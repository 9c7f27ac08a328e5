"""The Triton table of operations in the interpreter, against torch's."""

from __future__ import annotations

import pytest
import torch

pytest.importorskip("triton")

from nexusengine.attention.base import AttentionMeta, AttentionSpec
from nexusengine.attention.registry import backend_class
from nexusengine.layers.basic import Linear
from nexusengine.layers.ops import TorchOps
from nexusengine.layers.rotary import RotaryEmbedding
from nexusengine.layers.triton_ops import TritonOps
from nexusengine.model_config import ModelConfig
from nexusengine.models.llama import LlamaForCausalLM
from nexusengine.models.loader import WeightLoader
from nexusengine.triton_kernels import launch
from tests.support.attention_cases import BATCHES, make_case

pytestmark = pytest.mark.skipif(not launch.interpreted(), reason="needs TRITON_INTERPRET=1")
EPS = 1e-5
DTYPES = {torch.float32: 1e-6, torch.float16: 1e-3, torch.bfloat16: 2e-2}
"""The interpreter cuts float32 off to bfloat16 where a GPU rounds."""
CPU = torch.device("cpu")


def close(found: torch.Tensor, expected: torch.Tensor) -> bool:
    """To a unit or two in the last place of its type, of the largest number."""
    assert found.dtype == expected.dtype
    return bool((found.float() - expected.float()).abs().max() <= DTYPES[found.dtype] * (1 + expected.abs().max()))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("rows", "width"), [(1, 64), (5, 576), (3, 4096), (2, 100)])
def test_the_norm(dtype: torch.dtype, rows: int, width: int) -> None:
    torch.manual_seed(width)
    x, weight = (3 * torch.randn(rows, width)).to(dtype), (torch.rand(width) + 0.5).to(dtype)
    assert close(TritonOps(EPS).norm(x, weight), TorchOps(EPS).norm(x, weight))
    wide = torch.randn(rows, 2 * width).to(dtype)[:, :width]
    assert close(TritonOps(EPS).norm(wide, weight), TorchOps(EPS).norm(wide, weight))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("width", [16, 1536, 1025])
def test_the_gated_map(dtype: torch.dtype, width: int) -> None:
    torch.manual_seed(width)
    to = Linear((torch.randn(2 * width, 24) / 3).to(dtype), torch.randn(2 * width).to(dtype))
    x, norm = torch.randn(4, 24).to(dtype), torch.rand(24).to(dtype)
    assert close(TritonOps(EPS).gated(to, x), TorchOps(EPS).gated(to, x))
    assert close(TritonOps(EPS).gated(to, x, norm=norm), TorchOps(EPS).gated(to, x, norm=norm))


def test_the_activation_is_right_far_from_zero() -> None:
    from nexusengine.triton_kernels.activation import silu_mul

    gate = torch.tensor([[-1e30, -200.0, -88.0, -20.0, -1e-6, 0.0, 1e-6, 20.0, 200.0, 1e30]])
    found = silu_mul(torch.cat([gate, torch.ones_like(gate)], dim=1))
    assert torch.allclose(found, torch.nn.functional.silu(gate.double()).float(), rtol=1e-6, atol=1e-35)


@pytest.mark.parametrize("bias", [False, True])
def test_the_residual_is_added_where_it_lies(bias: bool) -> None:
    to = Linear(torch.randn(8, 6), torch.randn(8) if bias else None)
    x, into = torch.randn(3, 6), torch.randn(3, 8)
    expected = TorchOps(EPS).add_linear(to, x, into)
    found = TritonOps(EPS).add_linear(to, x, into)
    assert close(found, expected)
    assert found.data_ptr() == into.data_ptr()


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("heads", [(4, 4, 64), (6, 2, 80), (32, 8, 128), (3, 1, 6)])
def test_rotation_and_store(heads: tuple[int, int, int], dtype: torch.dtype) -> None:
    count, kv_count, dim = heads
    torch.manual_seed(1)
    qkv = torch.randn(11, (count + 2 * kv_count) * dim).to(dtype)
    slots = torch.randperm(36)[:11] + 4
    slots[4] = -1
    one = torch.tensor([1], dtype=torch.int32)
    meta = AttentionMeta(one, one, one, slots, [1], [1], 1, 1, 1)
    config = ModelConfig("LlamaForCausalLM", 8, 8, 8, 1, count, kv_count, dim, 64, EPS, 10_000.0)
    rotary, positions = RotaryEmbedding(config, 64, dtype, CPU), torch.randperm(64)[:11]
    spec = AttentionSpec(count, kv_count, dim, dtype, CPU, 4, 1.0)
    caches, rotated = {}, {}
    for table in (TritonOps(EPS), TorchOps(EPS)):
        cache = torch.full((2, 10, 4, kv_count, dim), torch.nan, dtype=dtype)
        rope_table, attention = table.rope_table(rotary, positions), backend_class("sdpa")(spec)
        q = table.rotate_and_store(qkv.clone(), rope_table, attention, cache[0], cache[1], meta, heads)
        rotated[table.name], caches[table.name] = q, cache
    assert close(rotated["triton"], rotated["torch"])
    caches["torch"][:, 0] = torch.nan  # torch's way with a token that is skipped: the null block takes it
    assert torch.equal(caches["triton"].isnan(), caches["torch"].isnan())
    assert close(caches["triton"].nan_to_num(), caches["torch"].nan_to_num())


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_model_computes_the_same_with_either_table_and_backend(dtype: torch.dtype) -> None:
    config = ModelConfig("LlamaForCausalLM", 97, 64, 96, 2, 4, 2, 16, 256, EPS, 10_000.0)
    spec = AttentionSpec(4, 2, 16, dtype, CPU, 16, 0.25)
    case = make_case(spec, BATCHES["mixed"])
    tokens = torch.arange(len(case.q)) % 97
    positions = torch.cat(
        [torch.arange(n - q, n) for n, q in zip(case.meta.seq_lens_host, case.meta.query_lens_host, strict=True)]
    )
    found = {}
    for ops, name in ((TorchOps(EPS), "sdpa"), (TritonOps(EPS), "triton")):
        loader = WeightLoader(config, None, dtype=dtype, device=CPU, seed=3, ops=ops)
        model = LlamaForCausalLM(loader, max_positions=256)
        kv = torch.stack([torch.stack([case.k_cache, case.v_cache])] * 2, dim=1).clone()
        attention = backend_class(name)(spec)
        attention.plan(case.meta)
        found[name] = model.logits(model.forward(tokens, positions, kv, attention, case.meta))
    difference = (found["triton"] - found["sdpa"]).abs().max()
    assert difference < (1e-4 if dtype == torch.float32 else 0.05) * found["sdpa"].abs().max()
