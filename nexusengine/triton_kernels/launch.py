"""Whether the Triton kernels can run, what a device offers them, and the one way in which they are launched."""

from __future__ import annotations

import functools
import importlib.util
import os
from typing import Any

import torch

SWITCH = "NEXUSENGINE_TRITON"
"""0 turns the kernels off: torch computes instead, for comparison."""
_SHARED_BYTES = {(7, 5): 65_536, (8, 0): 166_912, (8, 7): 166_912, (9, 0): 232_448, (10, 0): 232_448, (10, 3): 232_448}
"""Most shared memory of a program by compute capability (CUDA programming guide, table of technical
specifications)."""
_SHARED_BYTES_ELSEWHERE = 101_376
FP8_CAPABILITY = (8, 9)
"""From which on 8-bit floats are multiplied, and Triton converts them."""


def shared_bytes(capability: tuple[int, int]) -> int:
    """Most shared memory a program may use."""
    return _SHARED_BYTES.get(capability, _SHARED_BYTES_ELSEWHERE)


def interpreted() -> bool:
    """True if kernels run in Triton's interpreter, on a CPU."""
    return os.environ.get("TRITON_INTERPRET", "0").lower() in ("1", "true", "yes", "on", "y")


@functools.cache
def _importable() -> tuple[bool, str]:
    if importlib.util.find_spec("triton") is None:
        return False, "triton is not installed; it comes with torch for CUDA on Linux"
    try:
        import triton
    except Exception as error:  # a broken installation is a reason, not a crash
        return False, f"triton cannot be imported: {error}"
    return True, f"triton {triton.__version__}"


def probe(device: torch.device) -> tuple[bool, str]:
    """(whether kernels run on the device, why or why not). Never raises."""
    if os.environ.get(SWITCH) == "0":
        return False, f"turned off by {SWITCH}=0"
    if device.type == "cpu" and not interpreted():
        return False, "needs a CUDA device"
    if device.type not in ("cpu", "cuda"):
        return False, f"runs on CUDA, not on {device}"
    return _importable()


@functools.cache
def capability(device: torch.device) -> tuple[int, int]:
    """Compute capability; of a CPU that interprets kernels, the least one they are made for."""
    if device.type != "cuda":
        return 7, 5
    return torch.cuda.get_device_capability(device)


def launch(kernel: Any, grid: tuple[int, ...], *arguments: Any, **constants: Any) -> None:
    """Run a kernel over a grid.

    Args:
        kernel: compiled by Triton.
        grid: number of programs along each axis.
        arguments: of the kernel.
        constants: its compile-time arguments, and num_warps and num_stages.
    """
    kernel[grid](*arguments, **constants)
