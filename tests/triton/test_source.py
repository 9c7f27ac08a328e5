"""What kernels must not say, because one of the versions of Triton that they run on takes it for something else."""

from __future__ import annotations

import ast
from pathlib import Path

FOLDER = Path(__file__).parents[2] / "nexusengine" / "triton_kernels"


def test_no_kernel_inverts_bits_with_a_tilde() -> None:
    """Triton 3.6's interpreter makes ~x a xor with a signed -1, which numpy refuses for unsigned x."""
    found, kernels = [], 0
    for path in FOLDER.glob("*.py"):
        for node in ast.walk(ast.parse(path.read_text())):
            if not isinstance(node, ast.FunctionDef) or not any("jit" in ast.dump(d) for d in node.decorator_list):
                continue
            kernels += 1
            tildes = [n for n in ast.walk(node) if isinstance(n, ast.UnaryOp) and isinstance(n.op, ast.Invert)]
            found += [f"{path.name}:{n.lineno} {ast.unparse(n)}" for n in tildes]
    assert kernels > 20
    assert not found
