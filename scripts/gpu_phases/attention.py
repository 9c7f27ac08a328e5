"""The phases of attention backends: right against float32, and how fast they read K and V."""

from __future__ import annotations

from itertools import product
from typing import Any

import numpy as np
import torch

from gpu_phases.common import Cases, Findings, Setting, Skip
from nexusengine.attention.base import FP8, AttentionMeta, AttentionSpec
from nexusengine.attention.registry import BACKENDS, backend_class

SHAPES = [(32, 8, 128), (4, 4, 64), (8, 2, 64), (8, 2, 80), (8, 1, 256)]
"""(heads, KV heads, head dimension), the one that matters most first."""
_LIMITS = {torch.bfloat16: 0.03, torch.float16: 0.03, torch.float32: 1e-4}
_ROUNDS_Q = {"flash3": 0.2}
"""Limits of backends that with K and V of 8 bits round q to 8 bits too."""
_AIMS = {"triton": 0.7, "flash2": 0.85, "flash3": 0.85}
"""Share of the copy bandwidth that decode attention should reach. Falling short is shown and fails nothing."""


def limit_of(name: str, dtype: torch.dtype, kept: torch.dtype | None) -> float:
    """The largest error allowed of a backend.

    Args:
        name: of the backend.
        dtype: it computes in.
        kept: the type of K and V, if another.
    """
    return _ROUNDS_Q.get(name, _LIMITS[dtype]) if kept else _LIMITS[dtype]


def kernels(at: Setting) -> Findings:
    """Every backend against float32.

    MHA and GQA, head sizes, block edges, prefix hits, mixed batches; K and V of 8 bits where it keeps such.
    """
    cases = Cases(at)
    for (shape, kept), name in product(product(SHAPES[: 2 if at.tiny else None], (None, FP8)), BACKENDS):
        key = f"{name} {shape[0]}/{shape[1]}x{shape[2]}{' 8-bit K and V' if kept else ''}"
        cases.run(key, lambda name=name, shape=shape, kept=kept: _error(at, name, shape, kept))  # type: ignore[misc]
    return cases.end()


def attention_speed(at: Setting) -> Findings:
    """Decode attention as bytes of K and V a second, and as a share of the copy bandwidth measured beside it."""
    cases, copy_gb_s = Cases(at), at.copy_gb_s()
    for name in BACKENDS:
        cases.run(name, lambda name=name: _speed(at, name, copy_gb_s))  # type: ignore[misc]
    return cases.end()


def run_rows(at: Setting, name: str, spec: AttentionSpec, rows: list[tuple[int, int]]) -> float:
    """The largest error of a backend on rows of (tokens in the cache, queries)."""
    q, k, v, meta = _case(at, spec, rows)
    backend, out = backend_class(name)(spec), torch.empty_like(q)
    backend.plan(meta)
    backend.run(q, k, v, meta, out)
    return float((out.float() - _oracle(q, k, v, meta, spec.scale)).abs().max())


def row_kinds(block: int) -> list[list[tuple[int, int]]]:
    """Batches of (tokens in the cache, queries): one token, around a block's edges, a prompt, a mixture."""
    return [
        [(1, 1)],
        [(block, 1), (block + 1, 1), (block - 1, 1)],
        [(2 * block, 2 * block)],
        [(3 * block + 5, 7), (300, 1)],
    ]


def usable(at: Setting, name: str, shape: tuple[int, int, int], kept: torch.dtype | None = None) -> AttentionSpec:
    """The shape in the backend's own block size.

    Raises:
        Skip: the backend cannot run it here, with the reason.
    """
    cls = backend_class(name)
    heads, kv_heads, dim = shape
    spec = AttentionSpec(heads, kv_heads, dim, at.dtype, at.device, cls.caps().block_sizes[0], dim**-0.5, kv_dtype=kept)
    available, reason = cls.supports(spec)
    if kept and not cls.caps().fp8_cache:
        available, reason = False, "keeps no K and V of 8 bits"
    if available:
        available, reason = cls.probe()
    if not available:
        raise Skip(reason)
    return spec


def _error(at: Setting, name: str, shape: tuple[int, int, int], kept: torch.dtype | None) -> float:
    spec, limit = usable(at, name, shape, kept), limit_of(name, at.dtype, kept)
    worst = max(run_rows(at, name, spec, rows) for rows in row_kinds(spec.block_size))
    if not worst <= limit:
        raise AssertionError(f"off by {worst}, more than {limit}")
    return worst


def _speed(at: Setting, name: str, copy_gb_s: float) -> Findings:
    rows, length = (2, 64) if at.tiny else (32, 8192)
    spec = usable(at, name, (32, 8, 128))
    q, k, v, meta = _case(at, spec, [(length, 1)] * rows)
    backend, out = backend_class(name)(spec), torch.empty_like(q)
    backend.plan(meta)
    clock = at.seconds if backend.caps().graphs else at.host_seconds
    took_s = clock(lambda: backend.run(q, k, v, meta, out))
    gb_s = 2 * rows * length * 8 * 128 * k.element_size() / took_s / 1e9
    return {
        "gb_s": gb_s,
        "share": gb_s / copy_gb_s,
        "aim": _AIMS.get(name),
        "us": took_s * 1e6,
        "launches_included": clock != at.seconds or at.device.type != "cuda",
    }


def _case(at: Setting, spec: AttentionSpec, rows: list[tuple[int, int]]) -> tuple[Any, ...]:
    """q, caches, meta for rows of (tokens in the cache, queries); unused slots hold NaN. All made on the device."""
    size, device, generator = spec.block_size, at.device, at.generator()
    rows = sorted(rows, key=lambda r: r[1] > 1)
    blocks = [-(-length // size) for length, _ in rows]
    shape = (sum(blocks) + 1, size, spec.num_kv_heads, spec.head_dim)
    caches = [torch.full(shape, torch.nan, dtype=spec.dtype, device=device) for _ in range(2)]
    table = np.zeros((len(rows), max(blocks)), np.int32)
    first = 1
    for r, (length, _) in enumerate(rows):
        table[r, : blocks[r]] = np.arange(first, first + blocks[r])
        for cache in caches:
            flat = cache[first : first + blocks[r]].view(-1, spec.num_kv_heads, spec.head_dim)
            flat[:length].normal_(generator=generator)
        first += blocks[r]
    for cache in caches:
        cache[0] = 0.0
    counts = [count for _, count in rows]
    q = torch.randn(sum(counts), spec.num_heads, spec.head_dim, dtype=spec.dtype, device=device, generator=generator)
    meta = AttentionMeta(
        torch.from_numpy(table).to(device),
        torch.tensor([length for length, _ in rows], dtype=torch.int32, device=device),
        torch.tensor([0, *np.cumsum(counts).tolist()], dtype=torch.int32, device=device),
        torch.full((sum(counts),), -1, dtype=torch.long, device=device),
        [length for length, _ in rows],
        counts,
        sum(count == 1 for count in counts),
        max(length for length, _ in rows),
        max(counts),
    )
    k, v = (c.to(spec.kv_dtype) for c in caches) if spec.kv_dtype else caches
    return q, k, v, meta


def _oracle(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, meta: AttentionMeta, scale: float) -> torch.Tensor:
    """Float32, row by row."""
    out, k, v = torch.zeros_like(q, dtype=torch.float32), k.float(), v.float()
    at, group = 0, q.shape[1] // k.shape[2]
    for r, (length, count) in enumerate(zip(meta.seq_lens_host, meta.query_lens_host, strict=True)):
        ids = meta.block_table[r, : -(-length // k.shape[1])].long()
        keys, values = (c[ids].flatten(0, 1)[:length].float().repeat_interleave(group, 1) for c in (k, v))
        scores = torch.einsum("qhd,khd->hqk", q[at : at + count].float(), keys) * scale
        seen = torch.arange(length, device=q.device) <= torch.arange(length - count, length, device=q.device)[:, None]
        weights = scores.masked_fill(~seen, -torch.inf).softmax(-1)
        out[at : at + count] = torch.einsum("hqk,khd->qhd", weights, values)
        at += count
    return out
