"""Compiles what would be launched, for a GPU that is not there.

`Recorder` stands in for `launch.launch`: it takes the real arguments, as Triton's own launcher would specialise them
(types, and divisibility of pointers and numbers by 16), compiles down to machine code with ptxas, and remembers what
the program needs.
"""

from __future__ import annotations

from typing import Any

import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

_TYPES = {
    torch.float32: "*fp32",
    torch.float16: "*fp16",
    torch.bfloat16: "*bf16",
    torch.int32: "*i32",
    torch.int64: "*i64",
}


class Recorder:
    """shared: bytes of shared memory of each kernel launched, by name."""

    def __init__(self, capability: tuple[int, int]) -> None:
        self._target = GPUTarget("cuda", capability[0] * 10 + capability[1], 32)
        self.shared: dict[str, int] = {}

    def __call__(self, kernel: Any, grid: tuple[int, ...], *arguments: Any, **constants: Any) -> None:
        options = {name: constants.pop(name) for name in ("num_warps", "num_stages")}
        signature, values, attributes = {}, dict(constants), {}
        for place, (name, argument) in enumerate(zip(kernel.arg_names, arguments, strict=False)):
            if isinstance(argument, torch.Tensor):
                signature[name], divisible = _TYPES[argument.dtype], True
            elif isinstance(argument, float):
                signature[name], divisible = "fp32", False
            elif argument == 1:  # the launcher makes a constant of 1
                signature[name], values[name], divisible = "constexpr", 1, False
            else:
                signature[name], divisible = "i32" if abs(argument) < 2**31 else "i64", argument % 16 == 0
            if divisible:
                attributes[place,] = [["tt.divisibility", 16]]
        signature |= dict.fromkeys(constants, "constexpr")
        assert set(signature) == set(kernel.arg_names)
        ordered = {name: signature[name] for name in kernel.arg_names}
        compiled = triton.compile(ASTSource(kernel, ordered, values, attributes), self._target, options)
        assert compiled.asm["cubin"]
        name = kernel.__name__
        self.shared[name] = max(self.shared.get(name, 0), compiled.metadata.shared)
