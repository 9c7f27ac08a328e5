"""Weights of fewer bits: what is stored, what is computed with it, and how far that is from the float weight."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from nexusengine import native
from nexusengine.config import parse_device
from nexusengine.errors import ConfigError
from nexusengine.execute.base import ExecutorOptions
from nexusengine.execute.torch_executor import TorchExecutor
from nexusengine.layers.choice import choose_ops
from nexusengine.layers.native_ops import NativeOps
from nexusengine.loading.gguf_file import Q4Blocks
from nexusengine.loading.resolve import resolve_model
from nexusengine.model_config import ModelConfig
from nexusengine.native.pack import q4_blocks

EPS = 1e-5
AVAILABLE, REASON = native.probe()
ISAS = native.library().isas if AVAILABLE else ["none"]
needs_kernels = pytest.mark.skipif(not AVAILABLE, reason=REASON)


def numbers(blocks: Q4Blocks) -> torch.Tensor:
    """Float64 `[n, k]`."""
    q, scale, minimum = (torch.from_numpy(t).double() for t in (blocks.q, blocks.scale, blocks.minimum))
    n, k = q.shape
    return (q.view(n, k // 32, 32) * scale[..., None] + minimum[..., None]).view(n, k)


def stored(ops: NativeOps, weight: torch.Tensor | Q4Blocks, *, head: bool = False) -> torch.Tensor:
    """What the table keeps of a weight, read back as embeddings."""
    packed = ops.pack(weight, head=head)
    return ops.embed(torch.arange(packed.packed.n), packed).double()


@pytest.mark.parametrize("isa", ISAS)
@pytest.mark.parametrize(("quantization", "bits"), [("bf16", 8), ("int8", 7), ("int4", 4)])
@needs_kernels
def test_what_is_stored_is_close_and_what_is_computed_is_that(isa: str, quantization: str, bits: int) -> None:
    library = native.library()
    library.use(isa)
    try:
        torch.manual_seed(bits)
        ops = NativeOps(EPS, library, quantization)  # type: ignore[arg-type]
        weight, norm = torch.randn(70, 96), torch.rand(96) + 0.5
        kept = stored(ops, weight)
        assert (kept - weight).abs().max() <= weight.abs().max() * 2.0**-bits
        for rows in (1, 3, 40):
            x = torch.randn(rows, 96)
            normed = x.double() * torch.rsqrt(x.double().pow(2).mean(-1, keepdim=True) + EPS) * norm.double()
            exact = normed @ kept.T
            # rounding x to 8 bits: independent errors of largest / 127 / sqrt(12); 7 standard deviations
            error = normed.abs().amax(1, keepdim=True) / 127 / 12**0.5 * kept.pow(2).sum(1).sqrt()
            allowed = 1e-4 if quantization == "bf16" else 7 * error
            assert ((ops.linear(ops.pack(weight), x, norm=norm) - exact).abs() <= allowed).all()
            half = exact[:, :35]
            gated = half * torch.sigmoid(half) * exact[:, 35:]
            found = ops.gated(ops.pack(weight, gated=True), x, norm=norm)
            assert (found - gated).norm() <= (1e-5 if quantization == "bf16" else 0.03) * gated.norm()
    finally:
        library.use(library.isas[0])


@needs_kernels
@pytest.mark.parametrize("gated", [False, True])
def test_four_bit_blocks_are_kept_bit_for_bit(gated: bool) -> None:
    rng = np.random.default_rng(0)
    scale, minimum = (rng.normal(size=(50, 3)).astype(np.float16) for _ in range(2))
    blocks = Q4Blocks(rng.integers(0, 16, (50, 96), np.uint8), scale, minimum)
    ops = NativeOps(EPS, native.library(), "int4")
    if not gated:  # the two halves of a gated map are apart, so it has no rows to look up
        assert torch.allclose(stored(ops, blocks), numbers(blocks), rtol=1e-6, atol=1e-6)
    x = torch.randn(5, 96)
    y = x.double() @ numbers(blocks).T
    expected = y[:, :25] * torch.sigmoid(y[:, :25]) * y[:, 25:] if gated else y
    packed = ops.pack(blocks, gated=gated)
    found = ops.gated(packed, x) if gated else ops.linear(packed, x)
    assert (found - expected).norm() < 0.02 * expected.norm()


@needs_kernels
@pytest.mark.parametrize("quantization", ["int8", "int4"])
def test_a_row_that_is_not_finite_fails_alone(quantization: str) -> None:
    ops = NativeOps(EPS, native.library(), quantization)  # type: ignore[arg-type]
    x = torch.randn(20, 64)
    x[3, 7], x[11, 40] = torch.nan, torch.inf
    found = ops.linear(ops.pack(torch.randn(40, 64)), x)
    assert (~torch.isfinite(found).all(-1)).nonzero().flatten().tolist() == [3, 11]


@needs_kernels
def test_zeros_stay_zeros() -> None:
    for quantization in ("int8", "int4"):
        ops = NativeOps(EPS, native.library(), quantization)
        weight = torch.randn(20, 64)
        weight[4] = 0.0
        found = ops.linear(ops.pack(weight), torch.cat([torch.zeros(1, 64), torch.randn(2, 64)]))
        assert (found[0] == 0).all()
        assert (found[:, 4] == 0).all()


@needs_kernels
def test_heads_and_odd_widths_have_eight_bits() -> None:
    ops = NativeOps(EPS, native.library(), "int4")
    weight = torch.randn(20, 64)
    fine, coarse = ((stored(ops, weight, head=head) - weight).norm() for head in (True, False))
    assert fine < coarse / 8
    odd = torch.randn(20, 40)
    assert (stored(ops, odd) - odd).abs().max() < odd.abs().max() / 200


def test_rounding_to_blocks_keeps_least_and_largest() -> None:
    weight = torch.randn(6, 64)
    weight[2, :32] = 0.25
    kept = numbers(q4_blocks(weight))
    cut, back = weight.view(6, 2, 32), kept.view(6, 2, 32)
    width = cut.amax(2) - cut.amin(2)
    assert ((back - cut).abs().amax(2) <= width / 30 * 1.02 + 1e-3).all()


@pytest.mark.model
@needs_kernels
def test_the_default_model_keeps_the_blocks_of_its_file() -> None:
    files = resolve_model("smollm2-135m")
    options = ExecutorOptions(quantization="int4", kv_cache_bytes=2**24, max_model_len=64)
    executor = TorchExecutor.create(files, parse_device("cpu"), options, lambda phase, fraction: None)
    assert executor.spec.weights_bytes < 100e6
    from nexusengine.loading.weights import open_weights

    with open_weights(files) as source:
        for name in ("model.layers.3.self_attn.q_proj.weight", "model.layers.0.mlp.down_proj.weight"):
            blocks = source.stored(name)
            assert isinstance(blocks, Q4Blocks)
            assert (numbers(blocks) - source.get(name, torch.float32)).abs().max() < 1e-6
        assert source.stored("model.embed_tokens.weight") is None


@pytest.mark.parametrize("quantization", ["bf16", "int8", "int4"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_quantization_without_the_kernels_is_refused(quantization: str, dtype: torch.dtype) -> None:
    with pytest.raises(ConfigError, match=f"quantization {quantization}.*float32, not in {dtype}"):
        choose_ops(torch.device("cpu"), dtype, EPS, quantization)  # type: ignore[arg-type]


@needs_kernels
@pytest.mark.parametrize("quantization", ["bf16", "int8", "int4"])
def test_a_quantised_model_says_nearly_what_the_float_model_says(quantization: str) -> None:
    config = ModelConfig("LlamaForCausalLM", 97, 64, 96, 3, 4, 2, 16, 128, 1e-6, 10_000.0, tie_embeddings=True)
    logits = {}
    for kind in ("none", quantization):
        options = ExecutorOptions(quantization=kind, kv_cache_bytes=2**20, seed=5)  # type: ignore[arg-type]
        executor = TorchExecutor.build(config, None, parse_device("cpu"), options, lambda phase, fraction: None)
        hidden = torch.randn(40, 64, generator=torch.Generator().manual_seed(1))
        logits[kind] = executor._model.logits(hidden)
    apart = (logits[quantization] - logits["none"]).norm() / logits["none"].norm()
    assert apart < {"bf16": 0.005, "int8": 0.02, "int4": 0.02}[quantization]
