"""Makes nexusengine/profiles/data from the measurements of others: python scripts/build_profiles.py [--output DIR].

Reads ../shared/gpu_profiles and ../shared/step_logs. Times are rounded to 12 bits of mantissa (2e-4), so that the
tables compress; everything else is as measured. The result is the same byte for byte each time.
"""

from __future__ import annotations

import argparse
import csv
import gzip
import json
import shutil
import sys
from pathlib import Path
from typing import Any

import numpy as np

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from nexusengine.perf.features import StepFeatures
from nexusengine.profiles.fit import quantiles, scatter_of
from nexusengine.profiles.geometry import MODELS, kv_capacity_tokens

ROOT = Path(__file__).resolve().parent.parent
SHARED = ROOT.parent / "shared"
PROFILES = SHARED / "gpu_profiles"
LLMSERVINGSIM = "github.com/casys-kaist/LLMServingSim 5daddb21"

JOINT = [  # device, model, folder, shards
    ("rtxpro6000", "llama-3.1-8b", "RTXPRO6000/Llama-3.1-8B/tp1", 1),
    ("rtxpro6000", "qwen3-32b", "RTXPRO6000/Qwen3-32B/tp1", 1),
    ("rtxpro6000", "qwen3-30b-a3b", "RTXPRO6000/Qwen3-30B-A3B-Instruct-2507/tp1", 1),
    ("rtx4090", "llama-3.1-8b", "RTX4090/Llama-3.1-8B/tp1", 1),
]
DOUBLING = [16 * 2**i for i in range(11)]
SKEW_CHUNKS = (1, 257, 1025)
SKEW_SPREADS = (0.25, 0.75, 1.5, 3.0)
FEWEST_SKEWED = 6


def table(path: Path) -> list[dict[str, str]]:
    with gzip.open(path, "rt") as file:
        return list(csv.DictReader(file))


def compact(values: Any) -> np.ndarray:
    """float32 with 12 bits of mantissa."""
    bits = np.ascontiguousarray(values, np.float32).view(np.uint32)
    return ((bits + np.uint32(0x800)) & np.uint32(0xFFFFF000)).view(np.float32)


# ---- llmservingsim: every kernel of a layer, attention over chunk and decodes together -------------------------------


def joint_tables(folder: Path) -> dict[str, np.ndarray]:
    """Times in microseconds of one layer; `once_us` of what is there once."""
    dense: dict[str, dict[int, float]] = {}
    for r in table(folder / "dense.csv.gz"):
        dense.setdefault(r["layer"], {})[int(r["tokens"])] = float(r["time_us"])
    tokens = sorted(dense["qkv_proj"])
    once = {"embedding", "final_layernorm"}
    each = {name: (2 if name == "layernorm" else 1) for name in dense if name not in once}
    layer = [sum(times * dense[name][t] for name, times in each.items()) for t in tokens]
    out: dict[str, np.ndarray] = {
        "tokens": np.array(tokens, np.int32),
        "layer_us": compact(layer),
        "once_us": compact(
            [sum(np.interp(t, *zip(*sorted(dense[n].items()), strict=True)) for n in once) for t in tokens]
        ),
    }
    heads: dict[int, float] = {}
    for r in table(folder / "per_sequence.csv.gz"):
        heads[int(r["sequences"])] = heads.get(int(r["sequences"]), 0.0) + float(r["time_us"])
    out["sequences"], out["head_us"] = np.array(sorted(heads), np.int32), compact([heads[n] for n in sorted(heads)])
    if (folder / "moe.csv.gz").exists():
        out |= moe_table(folder / "moe.csv.gz")
    return out | attention_tables(folder / "attention.csv.gz") | skew_table(folder / "skew.csv.gz")


def attention_tables(path: Path) -> dict[str, np.ndarray]:
    """prefill_us `[chunk, cached]` alone, decode_us `[n, kv]` alone, beside_us `[chunk, cached, n, kv]`: what decodes
    add to a chunk, on the doubling grid only."""
    at = {
        (int(r["prefill_chunk"]), int(r["kv_prefill"]), int(r["n_decode"]), int(r["kv_decode"])): float(r["time_us"])
        for r in table(path)
    }
    chunks, cached = sorted({k[0] for k in at} - {0}), sorted({k[1] for k in at})
    prefill = np.empty((len(chunks), len(cached)))
    for i, q in enumerate(chunks):
        points = sorted((k[1], t) for k, t in at.items() if k[0] == q and k[2] == 0)
        prefill[i] = np.interp(cached, *zip(*points, strict=True))
    ns = sorted({k[2] for k in at if k[0] == 0})
    kvs = sorted({k[3] for k in at if k[0] == 0})
    decode = np.empty((len(ns), len(kvs)))
    for i, n in enumerate(ns):
        points = sorted((k[3], t) for k, t in at.items() if k[0] == 0 and k[2] == n)
        decode[i] = np.interp(kvs, *zip(*points, strict=True))
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


def skew_table(path: Path) -> dict[str, np.ndarray]:
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


def moe_table(path: Path) -> dict[str, np.ndarray]:
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


# ---- step logs -------------------------------------------------------------------------------------------------------


def read_log(path: Path) -> tuple[list[StepFeatures], np.ndarray]:
    features, took_s = [], []
    with gzip.open(path, "rt") as file:
        for line in file:
            step = json.loads(line)
            features.append(StepFeatures.of(np.array(step["q"], np.int32), np.array(step["ctx"], np.int32)))
            took_s.append(step["ms"] / 1e3)
    return features, np.array(took_s)


def pooled_noise(logs: list[Path]) -> dict[str, list[float]]:
    """Quantiles of the scatter of all logs together, each log as heavy as another."""
    parts: dict[str, list[np.ndarray]] = {"decode": [], "mixed": []}
    for path in logs:
        for kind, factors in zip(parts, scatter_of(*read_log(path)), strict=True):
            parts[kind].append(np.quantile(factors, np.linspace(0.001, 0.999, 1000)))
    return {kind: np.round(quantiles(np.concatenate(p)), 4).tolist() for kind, p in parts.items()}


# ---- all together ----------------------------------------------------------------------------------------------------


def joint_entry(device: str, model: str, shards: int) -> dict[str, Any]:
    geometry = MODELS[model]
    return {
        "device": device,
        "model": model,
        "kind": "joint",
        "confidence": "measured",
        "source": f"{LLMSERVINGSIM}: kernels of vLLM 0.19, attention of chunk and decodes together",
        "licence": "MIT, KAIST CASYS",
        "kv_capacity_tokens": kv_capacity_tokens(device, geometry, shards=shards),
        "weights_bytes": geometry.weights_bytes,
        "noise": "pooled",
    }


def build(output: Path) -> None:
    output.mkdir(parents=True, exist_ok=True)
    entries: list[dict[str, Any]] = []
    for device, model, folder, shards in JOINT:
        tables = joint_tables(PROFILES / "llmservingsim" / folder)
        entry = joint_entry(device, model, shards)
        entry["tables"] = f"{device}_{model}.npz"
        np.savez_compressed(output / entry["tables"], **tables)
        entries.append(entry)
    logs = sorted((SHARED / "step_logs").glob("*.jsonl.gz"))
    index = {"profiles": entries, "noise": {"pooled": pooled_noise(logs)}}
    (output / "index.json").write_text(json.dumps(index, indent=1) + "\n")
    for source in ("llmservingsim",):
        shutil.copyfile(PROFILES / source / "LICENSE", output / f"LICENSE.{source}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--output", type=Path, default=ROOT / "nexusengine" / "profiles" / "data")
    args = parser.parse_args()
    build(args.output)
    total = sum(f.stat().st_size for f in args.output.iterdir())
    print(f"{total} bytes in {args.output}")


if __name__ == "__main__":
    main()
