"""Devices nobody measured: the larger of computing and moving, with the efficiencies that measured cards reach."""

from __future__ import annotations

from dataclasses import dataclass, replace

import numpy as np

from nexusengine.perf.devices import DATASHEETS, Datasheet
from nexusengine.profiles.geometry import Geometry
from profile_sources.common import Tables, compact
from profile_sources.kernels import SMALL_KERNEL_US

SOURCE = "roofline over datasheet figures; nothing measured on this device"
DEVICES = ("l4", "a10", "t4")
FLOOR_US = 10.0
TOKENS = [1, 2, 4, 8, 16, 32, 64, 128, 192, 256, 384, 512, 768, 1024, 1536, 2048, 4096]
CHUNKS = [16, 32, 64, 128, 256, 512, 1024, 1536, 2048]
LENGTHS = [0, 16, 32, 64, 128, 256, 512, 1024, 2048, 4096, 8192, 16384, 32768]
DECODES = [1, 2, 4, 8, 16, 32, 64, 128, 256, 512]


EIGHT_BIT = {"t4"}
"""16-bit weights of an 8B model do not fit them."""


@dataclass(frozen=True, slots=True)
class Efficiencies:
    """Shares of the datasheet's figures: bandwidth when weights and when KV is read, FLOP/s of matrix products and of
    prefill attention."""

    weights: float
    kv: float
    products: float
    attention: float


def efficiencies(measured: list[tuple[str, Geometry, Tables]]) -> Efficiencies:
    """Medians over measured cards, of steps of 8 and of 2,048 tokens, 32 decodes of 4,096, prompts of 2,048 (the last
    without those that run FlashAttention 3 or later: L4, A10 and T4 cannot)."""
    shares = []
    for device, g, t in measured:
        sheet = DATASHEETS[device]
        parameters = g.attention_parameters + g.mlp_parameters

        def at(name: str, axis: str, x: int, t: Tables = t) -> float:
            return float(np.interp(x, t[axis], t[name]))

        n, q = t["decodes"].tolist().index(32), t["chunks"].tolist().index(2048)
        kv_us = float(np.interp(4096, t["decode_kv"], t["decode_us"][n]))
        flops = 4 * g.heads * g.head_dim * 2048**2 / 2
        fa2 = device in ("a100", "l40s", "rtx4090")
        shares.append(
            (
                g.bytes_per_weight * parameters / at("layer_us", "tokens", 8) / (sheet.bandwidth_gb_s * 1e3),
                32 * 4096 * g.kv_bytes_per_token / g.layers / kv_us / (sheet.bandwidth_gb_s * 1e3),
                2 * parameters * 2048 / at("layer_us", "tokens", 2048) / (sheet.tflops * 1e6),
                flops / float(t["prefill_us"][q, 0]) / (sheet.tflops * 1e6) if fa2 else np.nan,
            )
        )
    return Efficiencies(*(round(float(m), 2) for m in np.nanmedian(np.array(shares), axis=0)))


def served(device: str, g: Geometry) -> Geometry:
    return replace(g, bytes_per_weight=1) if device in EIGHT_BIT else g


def roofline_tables(device: str, g: Geometry, share: Efficiencies) -> Tables:
    """g: as `served`."""
    sheet = DATASHEETS[device]
    tokens = np.array(TOKENS, float)
    qkv = (g.heads + 2 * g.kv_heads) * g.head_dim
    shapes = [
        (qkv, g.hidden),
        (g.hidden, g.heads * g.head_dim),
        (2 * g.intermediate, g.hidden),
        (g.hidden, g.intermediate),
    ]
    bandwidth = sheet.bandwidth_gb_s * 1e3
    elements = 4 * g.hidden + (g.heads + g.kv_heads) * g.head_dim + 3 * g.intermediate
    layer = sum(product_us(sheet, share, tokens, n, k, g.bytes_per_weight) for n, k in shapes)
    layer = layer + 4 * SMALL_KERNEL_US + 2 * elements * tokens / bandwidth
    sequences = np.array(DECODES, float)
    head = (
        product_us(sheet, share, sequences, g.vocab, g.hidden, g.bytes_per_weight)
        + 25.0
        + 2.4 * 4 * g.vocab * sequences / bandwidth
    )
    kv_bytes = 2 * g.kv_heads * g.head_dim * g.bytes_per_kv
    read = np.array(DECODES)[:, None] * np.array(LENGTHS[1:])[None] * kv_bytes / (bandwidth * share.kv)
    q, ctx = np.array(CHUNKS, float)[:, None], np.array(LENGTHS, float)[None]
    pairs = np.maximum(q, 128) * (ctx + q / 2)
    computed = 4 * g.heads * g.head_dim * pairs / (sheet.tflops * 1e6 * share.attention)
    return {
        "tokens": np.array(TOKENS, np.int32),
        "layer_us": compact(layer),
        "once_us": compact(2 * SMALL_KERNEL_US + 6 * g.hidden * tokens / bandwidth),
        "sequences": np.array(DECODES, np.int32),
        "head_us": compact(head),
        "chunks": np.array(CHUNKS, np.int32),
        "cached": np.array(LENGTHS, np.int32),
        "prefill_us": compact(FLOOR_US + np.maximum(computed, (ctx + q) * kv_bytes / (bandwidth * share.kv))),
        "decodes": np.array(DECODES, np.int32),
        "decode_kv": np.array(LENGTHS[1:], np.int32),
        "decode_us": compact(FLOOR_US + read),
    }


def product_us(sheet: Datasheet, share: Efficiencies, m: np.ndarray, n: int, k: int, weight_bytes: int) -> np.ndarray:
    """(m, k) x (k, n) with 2-byte activations; a knee rounded as a 4-norm, as measured curves are."""
    moved = (weight_bytes * n * k + 2.0 * m * (n + k)) / (sheet.bandwidth_gb_s * 1e3 * share.weights)
    computed = 2.0 * m * n * k / (sheet.tflops * 1e6 * share.products)
    return (moved**4 + computed**4) ** 0.25
