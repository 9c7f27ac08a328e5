"""LLMServingSim: every kernel of a vLLM layer, attention over prompt chunk and decodes together."""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
from pathlib import Path

import numpy as np

from profile_sources.common import PROFILES, Tables, compact, table

SOURCE = "github.com/casys-kaist/LLMServingSim 5daddb21: kernels of vLLM 0.19, attention of chunk and decodes together"
LICENCE = "MIT, KAIST CASYS"
FOLDERS = {  # device and model of the profile
    ("rtxpro6000", "llama-3.1-8b"): "RTXPRO6000/Llama-3.1-8B/tp1",
    ("rtxpro6000", "qwen3-32b"): "RTXPRO6000/Qwen3-32B/tp1",
    ("rtxpro6000", "qwen3-30b-a3b"): "RTXPRO6000/Qwen3-30B-A3B-Instruct-2507/tp1",
    ("rtxpro6000-tp2", "llama-3.1-8b"): "RTXPRO6000/Llama-3.1-8B/tp2",
    ("rtxpro6000-tp2", "qwen3-32b"): "RTXPRO6000/Qwen3-32B/tp2",
    ("rtx4090", "llama-3.1-8b"): "RTX4090/Llama-3.1-8B/tp1",
}
DOUBLING = [16 * 2**i for i in range(11)]
SKEW_CHUNKS = (1, 257, 1025)
SKEW_SPREADS = (0.25, 0.75, 1.5, 3.0)
FEWEST_SKEWED = 6


def joint_tables(device: str, model: str) -> Tables:
    """Times in microseconds of one layer; `once_us` of what is there once."""
    folder = PROFILES / "llmservingsim" / FOLDERS[device, model]
    dense: dict[str, dict[int, float]] = {}
    for r in table(folder / "dense.csv.gz"):
        dense.setdefault(r["layer"], {})[int(r["tokens"])] = float(r["time_us"])
    tokens = sorted(dense["qkv_proj"])
    once = {"embedding", "final_layernorm"}
    each = {name: (2 if name == "layernorm" else 1) for name in dense if name not in once}
    layer = [sum(times * dense[name][t] for name, times in each.items()) for t in tokens]
    out: Tables = {
        "tokens": np.array(tokens, np.int32),
        "layer_us": compact(layer),
        "once_us": compact(sum(interpolated(tokens, dense[n].items()) for n in once)),
    }
    heads: dict[int, float] = {}
    for r in table(folder / "per_sequence.csv.gz"):
        heads[int(r["sequences"])] = heads.get(int(r["sequences"]), 0.0) + float(r["time_us"])
    out["sequences"], out["head_us"] = np.array(sorted(heads), np.int32), compact([heads[n] for n in sorted(heads)])
    if (folder / "moe.csv.gz").exists():
        out |= moe_table(folder / "moe.csv.gz")
    skew = skew_table(folder / "skew.csv.gz")
    if not skew_applies((folder.parent / "meta.yaml").read_text()):
        skew["skew_alpha"] = np.zeros_like(skew["skew_alpha"])
    return out | attention_tables(folder / "attention.csv.gz") | skew


def interpolated(at: Sequence[int], points: Iterable[tuple[int, float]]) -> np.ndarray:
    xs, ys = zip(*sorted(points), strict=True)
    found: np.ndarray = np.interp(at, xs, ys)
    return found


def attention_tables(path: Path) -> Tables:
    """prefill_us `[chunk, cached]` alone, decode_us `[n, kv]` alone, beside_us `[chunk, cached, n, kv]`: what decodes
    add to a chunk, on the doubling grid only."""
    at = {
        (int(r["prefill_chunk"]), int(r["kv_prefill"]), int(r["n_decode"]), int(r["kv_decode"])): float(r["time_us"])
        for r in table(path)
    }
    chunks, cached = sorted({k[0] for k in at} - {0}), sorted({k[1] for k in at})
    prefill = np.empty((len(chunks), len(cached)))
    for i, q in enumerate(chunks):
        prefill[i] = interpolated(cached, ((k[1], t) for k, t in at.items() if k[0] == q and k[2] == 0))
    ns = sorted({k[2] for k in at if k[0] == 0})
    kvs = sorted({k[3] for k in at if k[0] == 0})
    decode = np.empty((len(ns), len(kvs)))
    for i, n in enumerate(ns):
        decode[i] = interpolated(kvs, ((k[3], t) for k, t in at.items() if k[0] == 0 and k[2] == n))
    axes = [q for q in DOUBLING if q <= 2048], [0, *DOUBLING], sorted({k[2] for k in at if k[0]}), DOUBLING
    beside = np.zeros([len(a) for a in axes])
    for index in np.ndindex(*beside.shape):
        q, kv_q, n, kv = (a[i] for a, i in zip(axes, index, strict=True))
        if n:
            beside[index] = at[q, kv_q, n, kv] - at[q, kv_q, 0, 0]
    ints = {"chunks": chunks, "cached": cached, "decodes": ns, "decode_kv": kvs}
    ints |= dict(zip(("beside_chunks", "beside_cached", "beside_decodes", "beside_kv"), axes, strict=True))
    return {name: np.array(axis, np.int32) for name, axis in ints.items()} | {
        "prefill_us": compact(prefill),
        "decode_us": compact(decode),
        "beside_us": compact(np.maximum(beside, 0.0)),
    }


def skew_applies(meta: str) -> bool:
    """Whether the authors apply what they measured of unequal contexts: meta.yaml's skew_fit.enabled."""
    found = re.search(r"^skew_fit:\n  enabled: (true|false)$", meta, re.MULTILINE)
    if found is None:
        raise ValueError("meta.yaml says nothing of skew_fit")
    return found[1] == "true"


def skew_table(path: Path) -> Tables:
    """Medians of alpha by decodes, class of chunk and spread. The file's times are sums of three iterations, which
    alpha does not see. Cells with few rows take the median of all spreads, then of the next smaller n."""
    rows = table(path)
    n, q, mean, longest, alpha = (
        np.array([float(r[k] or "nan") for r in rows]) for k in ("n", "pc", "t_mean_us", "t_max_us", "alpha")
    )
    known = np.isfinite(alpha) & (longest > mean)
    spread = np.searchsorted(SKEW_SPREADS, (longest - mean) / mean, side="right")
    kind = np.searchsorted(SKEW_CHUNKS, q, side="right")
    ns = np.unique(n)
    out = np.zeros((len(ns), len(SKEW_CHUNKS) + 1, len(SKEW_SPREADS) + 1))
    for i, j in np.ndindex(*out.shape[:2]):
        cell = known & (n == ns[i]) & (kind == j)
        if not cell.any():
            out[i, j] = out[i - 1, j]
            continue
        for k in range(out.shape[2]):
            part = cell & (spread == k)
            out[i, j, k] = np.median(alpha[part if part.sum() >= FEWEST_SKEWED else cell])
    return {
        "skew_decodes": ns.astype(np.int32),
        "skew_chunks": np.array(SKEW_CHUNKS, np.int32),
        "skew_spreads": np.array(SKEW_SPREADS, np.float32),
        "skew_alpha": compact(np.clip(out, 0.0, 1.0)),
    }


def moe_table(path: Path) -> Tables:
    """moe_us `[tokens, experts]`, experts that got a token; cells that cannot be (more experts than tokens can reach)
    go on with the last slope, or that of the next row where there is one point only."""
    at = {(int(r["tokens"]), int(r["activated_experts"])): float(r["time_us"]) for r in table(path)}
    tokens, experts = sorted({k[0] for k in at}), sorted({k[1] for k in at})
    out = np.empty((len(tokens), len(experts)))
    for i in range(len(tokens) - 1, -1, -1):
        for j, e in enumerate(experts):
            measured = at.get((tokens[i], e))
            out[i, j] = out[i, j - 1] + out[i + 1, j] - out[i + 1, j - 1] if measured is None else measured
    return {
        "moe_tokens": np.array(tokens, np.int32),
        "moe_experts": np.array(experts, np.int32),
        "moe_us": compact(out),
    }
