"""The CPU kernels' table of operations against torch's in double precision, in every instruction set that runs here."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import torch

from nexusengine import native
from nexusengine.attention.base import AttentionMeta, AttentionSpec
from nexusengine.attention.registry import backend_class
from nexusengine.layers.basic import Linear
from nexusengine.layers.native_ops import NativeOps
from nexusengine.layers.ops import Ops, TorchOps
from nexusengine.layers.rotary import RotaryEmbedding
from nexusengine.model_config import ModelConfig

EPS = 1e-5
AVAILABLE, REASON = native.probe()
ISAS = native.library().isas if AVAILABLE else ["none"]
pytestmark = pytest.mark.skipif(not AVAILABLE, reason=REASON)


@pytest.fixture(params=ISAS)
def ops(request: pytest.FixtureRequest) -> Iterator[NativeOps]:
    library = native.library()
    library.use(request.param)
    library.set_threads(2)
    yield NativeOps(EPS, library)
    library.use(library.isas[0])
    library.set_threads(torch.get_num_threads())


def close(found: torch.Tensor, expected: torch.Tensor) -> bool:
    return bool((found - expected).abs().max() <= 2e-5 * (1 + expected.abs().max()))


@pytest.mark.parametrize("rows", [1, 3, 4, 5, 12, 13, 64, 300])
@pytest.mark.parametrize(("n", "k"), [(16, 8), (50, 33), (96, 576), (33, 1537)])
def test_linear_maps_with_norm_bias_and_addition(ops: NativeOps, rows: int, n: int, k: int) -> None:
    torch.manual_seed(rows)
    weight, bias, norm = torch.randn(n, k), torch.randn(n), torch.rand(k) + 0.5
    x, into = torch.randn(rows, k), torch.randn(rows, n)
    exact, exactly = TorchOps(EPS), Linear(weight.double(), bias.double())
    to = ops.pack(weight, bias)
    assert close(ops.linear(to, x), exactly(x.double()))
    # the oracle's norm is written out: rms_norm itself works in float32
    normed = x.double() * torch.rsqrt(x.double().pow(2).mean(-1, keepdim=True) + EPS) * norm.double()
    assert close(ops.linear(to, x, norm=norm), exactly(normed))
    assert close(ops.norm(x, norm), normed)
    assert close(ops.add_linear(to, x, into=into.clone()), exact.add_linear(exactly, x.double(), into.double()))
    assert close(ops.logits(to, x), exactly(x.double()))


@pytest.mark.parametrize("rows", [1, 6, 70])
@pytest.mark.parametrize("half", [16, 24, 48])
def test_the_gated_map(ops: NativeOps, rows: int, half: int) -> None:
    torch.manual_seed(half)
    weight, bias, x = torch.randn(2 * half, 40), torch.randn(2 * half), 5 * torch.randn(rows, 40)
    expected = TorchOps(EPS).gated(Linear(weight.double(), bias.double()), x.double())
    assert close(ops.gated(ops.pack(weight, bias, gated=True), x), expected)


def test_the_activation_is_right_far_from_zero(ops: NativeOps) -> None:
    gate = torch.tensor([-1e30, -200.0, -88.0, -87.0, -20.0, -1e-6, 0.0, 1e-6, 20.0, 87.0, 200.0, 1e30])
    weight = torch.zeros(2 * len(gate), 1)
    weight[: len(gate), 0], weight[len(gate) :] = gate, 1.0
    found = ops.gated(ops.pack(weight, gated=True), torch.ones(1, 1))[0]
    expected = torch.nn.functional.silu(gate.double())
    assert torch.allclose(found.double(), expected, rtol=1e-6, atol=2e-36)


def test_what_is_not_a_number_stays_in_its_row(ops: NativeOps) -> None:
    x = torch.randn(20, 32)
    x[3, 7], x[11, 0] = torch.nan, torch.inf
    for found in (
        ops.linear(ops.pack(torch.randn(40, 32)), x),
        ops.gated(ops.pack(torch.randn(40, 32), gated=True), x),
    ):
        broken = ~torch.isfinite(found).all(-1)
        assert broken.nonzero().flatten().tolist() == [3, 11]


def test_embeddings_are_rows_of_the_table(ops: NativeOps) -> None:
    table, ids = torch.randn(53, 24), torch.tensor([0, 52, 17, 15, 16, 52])
    assert torch.equal(ops.embed(ids, ops.pack(table)), table[ids])


@pytest.mark.parametrize("heads", [(4, 4, 64), (6, 2, 80), (3, 1, 6)])
def test_rotation_and_store(ops: NativeOps, heads: tuple[int, int, int]) -> None:
    count, kv_count, dim = heads
    torch.manual_seed(1)
    qkv = torch.randn(11, (count + 2 * kv_count) * dim)
    slots = torch.randperm(40)[:11]
    slots[4] = -1
    one = torch.tensor([1], dtype=torch.int32)
    meta = AttentionMeta(one, one, one, slots, [1], [1], 1, 1, 1)
    found, expected = (torch.full((2, 10, 4, kv_count, dim), torch.nan) for _ in range(2))
    config = ModelConfig("LlamaForCausalLM", 8, 8, 8, 1, count, kv_count, dim, 64, EPS, 10_000.0)
    rotary, positions = RotaryEmbedding(config, 64, torch.float32, torch.device("cpu")), torch.randperm(64)[:11]
    names: dict[str, tuple[Ops[Any], torch.Tensor]] = {"cpu": (ops, found), "sdpa": (TorchOps(EPS), expected)}
    rotated = {}
    for name, (table, cache) in names.items():
        spec = AttentionSpec(count, kv_count, dim, torch.float32, torch.device("cpu"), 4, 1.0)
        attention, rope_table = backend_class(name)(spec), table.rope_table(rotary, positions)
        rotated[name] = table.rotate_and_store(qkv.clone(), rope_table, attention, cache[0], cache[1], meta, heads)
    assert close(rotated["cpu"], rotated["sdpa"])
    expected[:, 0, 0] = torch.nan  # torch's way with a token that is skipped: the null block takes it
    assert torch.equal(found.isnan(), expected.isnan())
    assert close(found.nan_to_num(), expected.nan_to_num())


def test_a_step_is_remembered_and_replayed(ops: NativeOps) -> None:
    """The same inputs' places, other numbers in them: nothing but the kernels runs, and the result is right."""
    torch.manual_seed(4)
    table, norm = ops.pack(torch.randn(50, 32)), torch.rand(32)
    inner, outer = ops.pack(torch.randn(64, 32), gated=True), ops.pack(torch.randn(32, 32))
    ids = torch.tensor([3, 1, 4, 1])
    computed: list[int] = []

    def compute() -> torch.Tensor:
        computed.append(1)
        x = ops.embed(ids, table)
        return ops.norm(ops.add_linear(outer, ops.gated(inner, x, norm=norm), into=x), norm)

    first = ops.step(compute, (ids,)).clone()
    assert torch.equal(ops.step(compute, (ids,)), first)
    ids.copy_(torch.tensor([0, 49, 7, 3]))
    replayed = ops.step(compute, (ids,)).clone()
    assert len(computed) == 1
    assert torch.equal(replayed, compute())
    ids = ids[:3]
    assert torch.allclose(ops.step(compute, (ids,)), replayed[:3])
    assert len(computed) == 3, "another number of rows is another step"


def test_a_remembered_step_is_forgotten_when_its_memory_moves(ops: NativeOps) -> None:
    torch.manual_seed(5)
    to, few, many = ops.pack(torch.randn(48, 32)), torch.randn(3, 32), torch.randn(200, 32)
    expected = ops.step(lambda: ops.linear(to, few), (few,)).clone()
    ops.linear(to, many)
    assert torch.equal(ops.step(lambda: ops.linear(to, few), (few,)), expected)


def test_the_memory_of_results_is_reused_that_of_logits_too(ops: NativeOps) -> None:
    to = ops.pack(torch.randn(32, 16))
    a, b = torch.randn(9, 16), torch.randn(5, 16)
    assert ops.linear(to, a).data_ptr() == ops.linear(to, b).data_ptr()
    kept = ops.logits(to, a)
    expected = kept.clone()
    assert ops.logits(to, b).data_ptr() == kept.data_ptr()
    assert not torch.equal(kept[:5], expected[:5])
    assert torch.equal(ops.logits(to, a), expected)
