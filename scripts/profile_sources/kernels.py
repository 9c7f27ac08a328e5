"""aiconfigurator: matrix products, prefill attention and decode attention of vLLM, each measured alone.

What they leave out is estimated from the cards where everything was measured (LLMServingSim's RTX PRO 6000 and RTX
4090): small kernels cost 2.5 us plus their traffic at the memory's bandwidth (the norms and the rotary embedding, whose
tensors stay in the L2 cache, at twice that), sampling 25 us plus 2.4 passes over the float32 logits.

Two terms are calibrated on every second of the 42 deployments of Llama-3.1-8B on one H100 in silicon_sample.csv, and
used for all devices: a kernel costs 1.5 us beside its own time, and what grows with tokens is a tenth slower under
sustained load than one kernel over and over (scripts/validate_profiles.py shows what is left, also on other points).
"""

from __future__ import annotations

import numpy as np

from nexusengine.perf.devices import DATASHEETS
from nexusengine.profiles.geometry import Geometry
from profile_sources.common import PROFILES, Tables, compact, table

SOURCE = "github.com/ai-dynamo/aiconfigurator 095f58a5: kernels of vLLM"
LICENCE = "Apache-2.0, NVIDIA"
FOLDERS = {
    "h100": "h100_sxm/vllm-0.19.0",
    "h200": "h200_sxm/vllm-0.19.0",
    "b200": "b200_sxm/vllm-0.19.0",
    "a100": "a100_sxm/vllm-0.14.0",
    "l40s": "l40s/vllm-0.14.0",
}
PREFILL_OF = {"h200": "h100"}
"""The H200's own prefill attention cannot be: 16,384 tokens in 0.85 ms are 2.6 PFLOP/s on a 0.99 PFLOP/s part."""
CHUNKS = [16, 32, 64, 128, 256, 512, 1024, 1536, 2048]
CACHED = [0, 256, 512, 1024, 2048, 4096, 8192, 16384, 32768]
TILE = 128
SMALL_KERNEL_US = 2.5
KERNELS_A_LAYER, BESIDE_US, SUSTAINED = 9, 1.5, 1.10
LONGEST_DECODE_KV = 131072


class Gemms:
    """Microseconds of (m, k) x (k, n) at every measured m, bilinear in n and k; behind the grid with the last slope."""

    def __init__(self, device: str, dtype: str = "bfloat16") -> None:
        rows = [
            r for r in table(PROFILES / "aiconfigurator" / FOLDERS[device] / "gemm.csv.gz") if r["gemm_dtype"] == dtype
        ]
        at = {(int(r["m"]), int(r["n"]), int(r["k"])): 1e3 * float(r["latency"]) for r in rows}
        self.m, self.n, self.k = (sorted({key[i] for key in at}) for i in range(3))
        self.grid = np.array([[[at.get((m, n, k), np.nan) for k in self.k] for n in self.n] for m in self.m])

    def __call__(self, n: int, k: int) -> np.ndarray:
        (i, f), (j, g) = _segment(self.n, n), _segment(self.k, k)
        cell = self.grid[:, i : i + 2, j : j + 2]
        over_k = cell[:, :, 0] * (1 - g) + cell[:, :, 1] * g if g else cell[:, :, 0]
        return over_k[:, 0] * (1 - f) + over_k[:, 1] * f if f else over_k[:, 0]


def _segment(axis: list[int], x: int) -> tuple[int, float]:
    i = min(max(int(np.searchsorted(axis, x, side="right")) - 1, 0), len(axis) - 2)
    return i, (x - axis[i]) / (axis[i + 1] - axis[i])


def dense_tables(device: str, g: Geometry, dtype: str = "bfloat16") -> Tables:
    """layer_us, once_us by tokens; head_us by sequences."""
    gemm = Gemms(device, dtype)
    tokens = np.array(gemm.m)
    qkv = (g.heads + 2 * g.kv_heads) * g.head_dim
    products = (
        gemm(qkv, g.hidden)
        + gemm(g.hidden, g.heads * g.head_dim)
        + gemm(2 * g.intermediate, g.hidden)
        + gemm(g.hidden, g.intermediate)
    )
    bandwidth = DATASHEETS[device].bandwidth_gb_s * 1e3  # bytes a microsecond
    in_cache = 2 * 4 * g.hidden + 2 * (g.heads + g.kv_heads) * g.head_dim
    elements = in_cache / 2 + 3 * g.intermediate
    small = 4 * SMALL_KERNEL_US + 2 * elements * tokens / bandwidth
    logits = gemm(g.vocab, g.hidden)
    few = tokens <= 512
    sampling = 25.0 + 2.4 * 4 * g.vocab * tokens / bandwidth
    once = 2 * SMALL_KERNEL_US + 2 * 3 * g.hidden * tokens / bandwidth
    upto = tokens <= 8192
    return {
        "tokens": tokens[upto].astype(np.int32),
        "layer_us": compact(as_served(products + small)[upto]),
        "once_us": compact(once[upto]),
        "sequences": tokens[few].astype(np.int32),
        "head_us": compact((logits + sampling)[few]),
    }


def as_served(layer_us: np.ndarray) -> np.ndarray:
    """From kernels alone, by tokens, to what they take in an engine."""
    grows = np.maximum(layer_us - layer_us[0], 0.0)
    served: np.ndarray = layer_us + KERNELS_A_LAYER * BESIDE_US + (SUSTAINED - 1.0) * grows
    return served


def attention_tables(device: str, g: Geometry) -> Tables:
    """prefill_us `[chunk, cached]`, decode_us `[n, kv]`."""
    kv_heads = str(g.kv_heads)
    folder = PROFILES / "aiconfigurator" / FOLDERS[PREFILL_OF.get(device, device)]
    alone: dict[int, list[float]] = {}
    for r in table(folder / "context_attention.csv.gz"):
        if r["batch_size"] == "1" and r["num_heads"] == str(g.heads) and r["num_key_value_heads"] == kv_heads:
            alone.setdefault(int(r["isl"]), []).append(1e3 * float(r["latency"]))
    if not alone:
        raise ValueError(f"no prefill attention with {g.heads} and {g.kv_heads} heads on {device}")
    lengths = np.array(sorted(alone), float)
    whole = np.array([np.median(alone[int(x)]) for x in lengths])
    decodes, decode_kv, decode = _decodes(device, g)

    def of_prompt(length: float) -> float:
        if length > lengths[-1]:
            return float(whole[-1] * (length / lengths[-1]) ** 2)
        return float(np.interp(length**2, lengths**2, whole))

    prefill = np.empty((len(CHUNKS), len(CACHED)))
    for i, q in enumerate(CHUNKS):
        for j, cached in enumerate(CACHED):
            rest = of_prompt(max(q, TILE if cached else q) + cached) - (of_prompt(cached) if cached else 0.0)
            reading = float(np.interp(q + cached, decode_kv, decode[0]))
            prefill[i, j] = max(rest, of_prompt(q), reading if cached else 0.0)
    return {
        "chunks": np.array(CHUNKS, np.int32),
        "cached": np.array(CACHED, np.int32),
        "prefill_us": compact(SUSTAINED * prefill),
        "decodes": np.array(decodes, np.int32),
        "decode_kv": np.array(decode_kv, np.int32),
        "decode_us": compact(decode),
    }


def _decodes(device: str, g: Geometry) -> tuple[list[int], list[int], np.ndarray]:
    """By sequences and KV tokens; what did not fit the device's memory goes on with the slope before it."""
    at: dict[tuple[int, int], list[float]] = {}
    for r in table(PROFILES / "aiconfigurator" / FOLDERS[device] / "generation_attention.csv.gz"):
        if r["num_heads"] == str(g.heads) and r["num_key_value_heads"] == str(g.kv_heads):
            at.setdefault((int(r["batch_size"]), int(r["step"]) + 1), []).append(1e3 * float(r["latency"]))
    if not at:
        raise ValueError(f"no decode attention with {g.heads} and {g.kv_heads} heads on {device}")
    ns = sorted({k[0] for k in at if k[0] <= 1024})
    kvs = sorted({k[1] for k in at if k[1] <= LONGEST_DECODE_KV})
    out = np.empty((len(ns), len(kvs)))
    for i, n in enumerate(ns):
        points = sorted((kv, float(np.median(times))) for (m, kv), times in at.items() if m == n)
        x, y = np.array(points).T
        out[i] = np.interp(kvs, x, y)
        behind = np.array(kvs) > x[-1]
        out[i, behind] = y[-1] + (np.array(kvs)[behind] - x[-1]) * (y[-1] - y[-2]) / (x[-1] - x[-2])
    return ns, kvs, out


def kernel_tables(device: str, g: Geometry, dtype: str = "bfloat16") -> Tables:
    return dense_tables(device, g, dtype) | attention_tables(device, g)
