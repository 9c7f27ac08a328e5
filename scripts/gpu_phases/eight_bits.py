"""The phase that checks products with weights of 8 bits, and sets them beside those in the usual type."""

from __future__ import annotations

from functools import partial

import torch

from gpu_phases.common import Cases, Findings, Setting, Skip
from nexusengine.layers.basic import Linear
from nexusengine.layers.triton_ops import TritonOps
from nexusengine.loading.fp8 import Fp8Weight
from nexusengine.triton_kernels import fp8, launch


def eight_bits(at: Setting) -> Findings:
    """Weights by channel and by block, against float32 on the same rounded numbers.

    Error as a share of the largest result, time as a multiple of the product in the usual type.
    """
    available, reason = launch.probe(at.device)
    if not available:
        raise Skip(f"no Triton kernels: {reason}")
    if at.device.type == "cuda" and launch.capability(at.device) < launch.FP8_CAPABILITY:
        raise Skip("8-bit floats need compute capability 8.9")
    cases, generator, ops = Cases(at), at.generator(), TritonOps(1e-5, fp8=True)
    for outputs, inputs in [(256, 128)] if at.tiny else [(4096, 4096), (28_672, 4096), (4096, 14_336)]:
        for block in (None, (fp8.BLOCK, fp8.BLOCK)):
            shape = (outputs // fp8.BLOCK, inputs // fp8.BLOCK) if block else (outputs, 1)
            data = torch.randn(outputs, inputs, device=at.device, generator=generator).to(torch.float8_e4m3fn)
            scale = torch.rand(shape, device=at.device, generator=generator) + 0.5
            weight = Fp8Weight(data, scale, block)
            numbers, kept = weight.numbers(torch.float32), ops.pack(weight)
            plain = Linear(numbers.to(at.dtype))
            for tokens in (1, 17) if at.tiny else (1, 16, 64, 512):
                x = torch.randn(tokens, inputs, device=at.device, generator=generator).to(at.dtype)
                group = fp8.BLOCK if block else None
                cases.run(
                    f"{'block' if block else 'channel'} {outputs}x{inputs} at {tokens}",
                    partial(_product, at, x, kept, plain, numbers, group),
                )
    return cases.end()


def _product(
    at: Setting, x: torch.Tensor, kept: Linear, plain: Linear, numbers: torch.Tensor, group: int | None
) -> Findings:
    """Error and time of the product that is kept in 8 bits, beside the usual one and the exact one of its numbers."""
    small, scales = fp8.quantize(x, group)
    width = x.shape[1] // scales.shape[1]
    exact = (small.float() * scales.repeat_interleave(width, 1)) @ numbers.t()
    error = float((kept(x).float() - exact).abs().max() / exact.abs().max())
    if not error <= 0.02:
        raise AssertionError(f"off by {error} of the largest result")
    return {"error": error, "times_the_usual": at.seconds(partial(kept, x)) / at.seconds(partial(plain, x))}
