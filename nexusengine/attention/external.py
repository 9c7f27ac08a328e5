"""The part that the adapters of other libraries share.

It finds a function by its signature, checks what all of them ask of a shape, and stores K and V. Whether a function
will do is read off its parameters, not off a version: the same names come from several packages.
"""

from __future__ import annotations

import importlib
import inspect
from collections.abc import Callable
from typing import Any

import torch

from nexusengine.attention.base import FP8, AttentionMeta, AttentionSpec, as_stored
from nexusengine.triton_kernels import launch

HALF = (torch.bfloat16, torch.float16)


def find(module: str, name: str, parameters: tuple[str, ...], install: str) -> tuple[Callable[..., Any] | None, str]:
    """Find a function or class of another library; never raises.

    Args:
        module: that holds it.
        name: of the function or class.
        parameters: it has to take.
        install: how to get the library, for the reason.

    Returns:
        It and what was found, or None and what is missing.
    """
    try:
        found = getattr(importlib.import_module(module), name, None)
    except ImportError as error:
        return None, f"{module} cannot be imported ({error}); {install}"
    except Exception as error:  # a broken extension is a reason, not a crash
        return None, f"{module} fails on import: {type(error).__name__}: {error}"
    if found is None:
        return None, f"{module} has no {name}; {install}"
    try:
        known = inspect.signature(found).parameters
    except (TypeError, ValueError):
        return None, f"{module}.{name} does not tell its parameters"
    missing = [parameter for parameter in parameters if parameter not in known]
    if missing:
        return None, f"{module}.{name} knows no {', '.join(missing)}; {install}"
    return found, f"{module}.{name}"


def capability(device: torch.device) -> tuple[int, int] | None:
    """Compute capability; None of what is no CUDA device."""
    return torch.cuda.get_device_capability(device) if device.type == "cuda" else None


def fits(
    spec: AttentionSpec, majors: tuple[int, ...], max_dim: int = 256, dtypes: tuple[torch.dtype, ...] = HALF
) -> tuple[bool, str]:
    """Check what every library here asks of a shape: half precision, head dimensions that are multiples of 8.

    Args:
        spec: the shape.
        majors: generations of CUDA devices, by compute capability.
        max_dim: largest head dimension.
        dtypes: that it computes in.

    Returns:
        Whether it fits, and why or why not.
    """
    found = capability(spec.device)
    if found is None:
        return False, f"needs a CUDA device, not {spec.device}"
    if found[0] not in majors:
        wanted = ", ".join(f"{major}.x" for major in majors)
        return False, f"made for compute capability {wanted}; this is {found[0]}.{found[1]}"
    if spec.dtype not in dtypes:
        return False, f"does not compute in {spec.dtype}"
    if spec.kv_dtype == FP8 and found < launch.FP8_CAPABILITY:  # our kernels store K and V
        return False, "K and V of 8 bits need compute capability 8.9"
    if spec.num_heads % spec.num_kv_heads or spec.head_dim % 8 or spec.head_dim > max_dim:
        return False, f"{spec.num_heads} heads of {spec.head_dim} over {spec.num_kv_heads} KV heads"
    return True, f"head dimensions up to {max_dim} in half precision"


def window_of(spec: AttentionSpec) -> tuple[int, int]:
    """(keys before its own that a query sees, keys after), -1 for all, as flash-attn counts.

    Without a window both are -1, beside causal=True: a limit to the right would keep decodes from packing the heads
    that share K and V.
    """
    return (spec.window - 1, 0) if spec.window else (-1, -1)


def options_of(spec: AttentionSpec) -> dict[str, Any]:
    """Options of every call to flash-attn's functions, by the names of its versions 2 to 4."""
    return {
        "softmax_scale": spec.scale,
        "causal": True,
        "window_size": window_of(spec),
        "softcap": spec.soft_cap or 0.0,
    }


class External:
    """The part that the adapters have in common."""

    def plan(self, meta: AttentionMeta) -> None:
        """Nothing, where the function schedules its work itself."""

    def store(
        self, k: torch.Tensor, v: torch.Tensor, k_cache: torch.Tensor, v_cache: torch.Tensor, meta: AttentionMeta
    ) -> None:
        """Models come here only by torch's table of operations; TritonOps stores while it rotates.

        Skipped tokens land in the null block, which nobody reads.
        """
        slots = meta.slot_mapping.clamp_min(0)
        k_cache.view(-1, *k.shape[1:])[slots] = as_stored(k, k_cache)
        v_cache.view(-1, *v.shape[1:])[slots] = as_stored(v, v_cache)


class Finite:
    """Makes a cache's numbers finite, once.

    Kernels that load whole pages of V by TMA give keys past a row's end the weight 0, and 0 times a NaN that was never
    written is NaN.
    """

    def __init__(self) -> None:
        self._done: set[int] = set()

    def __call__(self, v_cache: torch.Tensor) -> None:
        if v_cache.data_ptr() in self._done:
            return
        self._done.add(v_cache.data_ptr())
        if v_cache.dtype == FP8:
            bits = v_cache.view(torch.uint8)
            bits.masked_fill_((bits & 0x7F) == 0x7F, 0)  # the only two that are no numbers
        else:
            torch.nan_to_num(v_cache, nan=0.0, posinf=0.0, neginf=0.0, out=v_cache)
