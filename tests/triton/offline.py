"""Compiles what would be launched, for a GPU that is not there.

`Recorder` stands in for `launch.launch`: it takes the real arguments, lets Triton specialise them as its own launcher
does (types, and divisibility of pointers and numbers by 16), compiles down to machine code with ptxas, and remembers
what the program needs. `variants` stops before compiling: it says which program a launch would take.
"""

from __future__ import annotations

from typing import Any

import pytest
import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource, make_backend
from triton.runtime.jit import create_function_from_signature


def need_scales_by_output() -> None:
    """Skips a test where torch's product of 8-bit floats has one scale alone on a CPU, as in torch 2.11."""
    small, ones = torch.ones(16, 16).to(torch.float8_e4m3fn), torch.ones(16, 1)
    try:
        torch._scaled_mm(small, small.t(), scale_a=ones, scale_b=ones.view(1, -1), out_dtype=torch.bfloat16)
    except RuntimeError as error:
        pytest.skip(f"torch {torch.__version__} has no product with scales by output on a CPU: {error}"[:150])


def specialised(kernel: Any, target: GPUTarget, arguments: tuple[Any, ...], constants: dict[str, Any]) -> list[Any]:
    """(type, what is known of the value or the constant itself) of each argument: with the constants, the key under
    which Triton keeps a compiled program."""
    bind = create_function_from_signature(kernel.signature, kernel.params, make_backend(target))
    found: list[Any] = bind(*arguments, **constants)[1]
    return found


class Recorder:
    """shared: bytes of shared memory of each kernel launched, by name. compiled: whether to compile, or only to note in
    `variants` which program would be needed."""

    def __init__(self, capability: tuple[int, int], compiled: bool = True) -> None:
        self._target = GPUTarget("cuda", capability[0] * 10 + capability[1], 32)
        self._compiled = compiled
        self.shared: dict[str, int] = {}
        self.variants: dict[str, set[str]] = {}

    def __call__(self, kernel: Any, grid: tuple[int, ...], *arguments: Any, **constants: Any) -> None:
        options = {name: constants.pop(name) for name in ("num_warps", "num_stages")}
        known, name = specialised(kernel, self._target, arguments, constants), kernel.__name__
        self.variants.setdefault(name, set()).add(str((known, options)))
        if not self._compiled:
            return
        values, attributes = {}, {}
        for place, (argument, (kind, fact)) in enumerate(zip(kernel.arg_names, known, strict=True)):
            if kind == "constexpr":
                values[argument] = fact
            elif isinstance(fact, str):
                attributes[place,] = make_backend(self._target).parse_attr(fact)
        signature = dict(zip(kernel.arg_names, (kind for kind, _ in known), strict=True))
        program = triton.compile(ASTSource(kernel, signature, values, attributes), self._target, options)
        assert program.asm["cubin"]
        self.shared[name] = max(self.shared.get(name, 0), program.metadata.shared)
