"""Which attention backend runs: in order of preference, with the reason for each one that does not."""

from __future__ import annotations

import importlib
from dataclasses import replace

from nexusengine.attention.base import AttentionBackend, AttentionSpec
from nexusengine.errors import ConfigError

BACKENDS: dict[str, str] = {
    "cpu": "nexusengine.attention.native_cpu:NativeCpuBackend",
    "sdpa": "nexusengine.attention.sdpa:SdpaBackend",
}
"""By name, best first; a module is imported only when its backend is considered."""


def backend_class(name: str) -> type[AttentionBackend]:
    module, _, attribute = BACKENDS[name].partition(":")
    found: type[AttentionBackend] = getattr(importlib.import_module(module), attribute)
    return found


def choose(
    spec: AttentionSpec, wanted: str | None = None, block_size: int | None = None
) -> tuple[type[AttentionBackend], AttentionSpec, list[tuple[str, str]]]:
    """The backend, the spec with its block size, and (name, why not) of those passed over.

    Raises ConfigError if `wanted` is unknown or cannot run here.
    """
    if wanted is not None and wanted not in BACKENDS:
        raise ConfigError(
            f"unknown attention backend {wanted!r}; known: {', '.join(BACKENDS)}", param="attention_backend"
        )
    passed_over: list[tuple[str, str]] = []
    for name in [wanted] if wanted else BACKENDS:
        cls = backend_class(name)
        chosen = replace(spec, block_size=block_size or cls.caps().block_sizes[0])
        available, reason = cls.supports(chosen)
        if available:  # asked second: it may have to build something
            available, reason = cls.probe()
        if available and chosen.block_size not in cls.caps().block_sizes:
            available, reason = False, f"cannot use blocks of {chosen.block_size} tokens"
        if available:
            return cls, chosen, passed_over
        passed_over.append((name, reason))
    reasons = "; ".join(f"{name}: {reason}" for name, reason in passed_over)
    raise ConfigError(f"no attention backend can run here ({reasons})", param="attention_backend")
