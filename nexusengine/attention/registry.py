"""Which attention backend runs: in order of preference by device, with the reason for each one that does not."""

from __future__ import annotations

import importlib
from collections.abc import Iterable
from dataclasses import replace

import torch

from nexusengine.attention.base import FP8, AttentionBackend, AttentionSpec
from nexusengine.errors import ConfigError

BACKENDS: dict[str, str] = {
    "cpu": "nexusengine.attention.native_cpu:NativeCpuBackend",
    "flash2": "nexusengine.attention.flash2:Flash2Backend",
    "flash3": "nexusengine.attention.flash3:Flash3Backend",
    "flash4": "nexusengine.attention.flash4:Flash4Backend",
    "torch-varlen": "nexusengine.attention.torch_varlen:TorchVarlenBackend",
    "flashinfer": "nexusengine.attention.flashinfer:FlashInferBackend",
    "triton": "nexusengine.attention.triton:TritonBackend",
    "sdpa": "nexusengine.attention.sdpa:SdpaBackend",
}
"""By name; a module is imported only when its backend is considered."""
_ORDER: dict[int, tuple[str, ...]] = {
    7: ("triton", "sdpa"),
    9: ("flash3", "flash2", "torch-varlen", "triton", "sdpa"),
    10: ("flash4", "flashinfer", "triton", "sdpa"),
}
"""Best first, by the first figure of the compute capability."""
_ORDER_ELSEWHERE = ("flash2", "flashinfer", "triton", "sdpa")
_ORDER_CPU = ("cpu", "sdpa")


def backend_class(name: str) -> type[AttentionBackend]:
    module, _, attribute = BACKENDS[name].partition(":")
    found: type[AttentionBackend] = getattr(importlib.import_module(module), attribute)
    return found


def preferred(device: torch.device, capability: tuple[int, int] | None = None) -> tuple[str, ...]:
    """Names of backends for a device, best first.

    Args:
        device: on which attention is computed.
        capability: of a CUDA device, asked of it if not given.
    """
    if device.type != "cuda":
        return _ORDER_CPU
    major, _ = capability or torch.cuda.get_device_capability(device)
    return _ORDER.get(major, _ORDER_ELSEWHERE)


def consider(
    spec: AttentionSpec, names: Iterable[str], block_size: int | None = None
) -> Iterable[tuple[str, AttentionSpec, bool, str]]:
    """(name, the spec with its block size, whether it can run, why or why not) for each backend in turn."""
    for name in names:
        cls = backend_class(name)
        caps = cls.caps()
        chosen = replace(spec, block_size=block_size or caps.block_sizes[0])
        available, reason = cls.supports(chosen)
        if available and (spec.window or spec.soft_cap) and not caps.modifiers:
            available, reason = False, "knows no sliding windows and soft caps"
        if available and spec.kv_dtype == FP8 and not caps.fp8_cache:
            available, reason = False, "keeps no K and V of 8 bits"
        if available:  # asked after the rest: it may have to build something
            available, reason = cls.probe()
        if available and chosen.block_size not in caps.block_sizes:
            available, reason = False, f"cannot use blocks of {chosen.block_size} tokens"
        yield name, chosen, available, reason


def choose(
    spec: AttentionSpec,
    wanted: str | None = None,
    block_size: int | None = None,
    capability: tuple[int, int] | None = None,
) -> tuple[type[AttentionBackend], AttentionSpec, list[tuple[str, str]]]:
    """Choose the backend for a shape: the one wanted, else the best that can run here.

    Returns:
        The backend, the spec with its block size, and (name, why not) of those passed over.

    Raises:
        ConfigError: `wanted` is unknown or cannot run here.
    """
    if wanted is not None and wanted not in BACKENDS:
        raise ConfigError(
            f"unknown attention backend {wanted!r}; known: {', '.join(BACKENDS)}", param="attention_backend"
        )
    passed_over: list[tuple[str, str]] = []
    names = (wanted,) if wanted else preferred(spec.device, capability)
    for name, chosen, available, reason in consider(spec, names, block_size):
        if available:
            return backend_class(name), chosen, passed_over
        passed_over.append((name, reason))
    reasons = "; ".join(f"{name}: {reason}" for name, reason in passed_over)
    if spec.kv_dtype == FP8:
        message = f"no attention backend can keep K and V in 8 bits here ({reasons}); leave kv_cache_dtype at auto"
        raise ConfigError(message, param="kv_cache_dtype")
    raise ConfigError(f"no attention backend can run here ({reasons})", param="attention_backend")
