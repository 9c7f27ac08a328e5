"""From tables to a profile: of the model they were measured with, or scaled to another of similar shape.

Kinds: "joint" (everything measured, attention of chunks and decodes together), "split" (attention of chunks and of
decodes apart), "fitted" (weights of profiles.fit's formula). scripts/build_profiles.py writes them.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from nexusengine.arrays import F8
from nexusengine.errors import ConfigError
from nexusengine.profiles.attention import Attention, JointAttention, Skew, SplitAttention
from nexusengine.profiles.base import DeviceProfile, ProfileIdentity
from nexusengine.profiles.composed import ComposedProfile, Measured
from nexusengine.profiles.curves import Curve, Quad, Surface
from nexusengine.profiles.fitted import FittedProfile
from nexusengine.profiles.geometry import Geometry
from nexusengine.profiles.links import LINKS
from nexusengine.profiles.moe import Experts
from nexusengine.profiles.noise import Noise

Tables = Mapping[str, npt.NDArray[Any]]

_US = 1e-6
_LAUNCH_S = 2.5e-6
_DENSE_KERNELS = 9
_ATTENTION_FLOOR_S = 8e-6
_MOST_UNLIKE = 3.0


@dataclass(frozen=True, slots=True)
class Scale:
    """Target over base: weights of a layer, of the output head, width of the queries, width of K and V."""

    layer: float = 1.0
    head: float = 1.0
    queries: float = 1.0
    kv: float = 1.0


SAME = Scale()


def scale_between(base: Geometry, target: Geometry) -> Scale:
    """The ratios of the work of one model to that of another.

    Raises:
        ConfigError: the shapes are too unlike for measured times to say anything.
    """
    scale = Scale(
        (target.attention_parameters + target.mlp_parameters) / (base.attention_parameters + base.mlp_parameters),
        target.vocab * target.hidden / (base.vocab * base.hidden),
        target.heads * target.head_dim / (base.heads * base.head_dim),
        target.kv_heads * target.head_dim / (base.kv_heads * base.head_dim),
    )
    if base.experts or target.experts:
        raise ConfigError("models with experts are not scaled")
    if base.head_dim != target.head_dim:
        raise ConfigError(f"heads of {target.head_dim} elements, measured with {base.head_dim}")
    if base.bytes_per_weight != target.bytes_per_weight or base.bytes_per_kv != target.bytes_per_kv:
        raise ConfigError(f"weights of {target.bytes_per_weight} bytes, measured with {base.bytes_per_weight}")
    for what, factor in (("a layer", scale.layer), ("the query width", scale.queries)):
        if not 1 / _MOST_UNLIKE <= factor <= _MOST_UNLIKE:
            raise ConfigError(f"{what} is {factor:.2g} times that of the model measured; at most {_MOST_UNLIKE:g} is")
    return scale


def _scaled(seconds: F8, factor: float, floor_s: float) -> F8:
    """What is above the launches grows with the work."""
    if factor == 1.0:
        return seconds
    out: F8 = floor_s + np.maximum(seconds - floor_s, 0.0) * factor
    return out


def assemble(
    identity: ProfileIdentity, entry: Mapping[str, Any], tables: Tables, geometry: Geometry, scale: Scale, noise: Noise
) -> DeviceProfile:
    """Make a profile of measured parts.

    Args:
        identity: of the profile.
        entry: of the registry.
        tables: of the model measured.
        geometry: of the model asked for.
        scale: of the model asked for against the one measured.
        noise: scatter of steps.
    """
    if entry["kind"] == "fitted":
        return FittedProfile(
            identity, weights_s=_scaled_weights(entry["weights_s"], geometry, scale, entry), noise=noise
        )
    tokens = tables["tokens"].astype(np.float64)
    layer_s = _scaled(_seconds(tables, "layer_us"), scale.layer, _DENSE_KERNELS * _LAUNCH_S)
    dense_s = geometry.layers * layer_s + _seconds(tables, "once_us")
    sequences = tables["sequences"].astype(np.float64)
    head_s = _scaled(_seconds(tables, "head_us"), scale.head, _LAUNCH_S)
    if entry.get("shards", 1) > 1:
        link = LINKS[entry["link"]]
        activations, logits = 2 * geometry.hidden * tokens, 2 * geometry.vocab * sequences
        dense_s += (2 * geometry.layers + 1) * link.all_reduce_s(activations)
        head_s += link.all_gather_s(logits / entry["shards"])
    return ComposedProfile(
        identity,
        layers=geometry.layers,
        hidden=geometry.hidden,
        dense=Curve(tokens, dense_s),
        attention=_attention(entry, tables, scale),
        head=Curve(sequences, head_s),
        experts=Experts(tables, geometry) if geometry.experts else None,
        noise=noise,
        measured=Measured(int(tokens[-1]), int(sequences[-1]), int(tables["decode_kv"][-1])),
    )


def _attention(entry: Mapping[str, Any], t: Tables, scale: Scale) -> Attention:
    decode_s = _scaled(_seconds(t, "decode_us"), scale.kv, _ATTENTION_FLOOR_S)
    prefill_s = _scaled(_seconds(t, "prefill_us"), scale.queries, _ATTENTION_FLOOR_S)
    decodes = Surface(t["decodes"], t["decode_kv"], decode_s)
    prefill = Surface(t["chunks"], t["cached"], prefill_s)
    if entry["kind"] == "split":
        return SplitAttention(decodes, prefill, int(t["chunks"][0]), entry["beside"])
    beside_s = _scaled(_seconds(t, "beside_us"), scale.kv, 0.0)
    axes = [t["beside_chunks"], t["beside_cached"], t["beside_decodes"], t["beside_kv"]]
    skew = Skew(t["skew_decodes"], t["skew_chunks"], t["skew_spreads"].astype(np.float64), t["skew_alpha"])
    return JointAttention(decodes, prefill, Quad(axes, beside_s), skew, int(t["chunks"][0]))


def _seconds(tables: Tables, name: str) -> F8:
    return tables[name].astype(np.float64) * _US


def _scaled_weights(weights_s: list[float], geometry: Geometry, scale: Scale, entry: Mapping[str, Any]) -> list[float]:
    """Weights of the formula of profiles.fit for another shape.

    Dense terms grow with the weights of all layers, pairs with the query width, KV terms with the width of K and V.
    """
    layers = geometry.layers / entry["layers"]
    dense = layers * scale.layer
    factors = [dense] * (len(weights_s) - 3) + [layers * scale.queries] + [layers * scale.kv] * 2
    return [w * f for w, f in zip(weights_s, factors, strict=True)]
