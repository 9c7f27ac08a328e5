"""Base and scaling of rotary embeddings from a config.json, by transformers' rules.

In the old spelling (rope_theta, rope_scaling.type) and the new one (rope_parameters).
"""

from __future__ import annotations

from typing import Any

from nexusengine.loading.json_reader import Reader
from nexusengine.loading.shown import short
from nexusengine.model_config import RopeScaling

_KINDS = ("default", "linear", "dynamic", "llama3", "yarn")
_NOT_COMPUTED = ("mrope_section", "long_factor", "short_factor", "alpha")


def read_rope(r: Reader, max_position: int) -> tuple[float, RopeScaling | None]:
    """(base, scaling).

    Raises:
        ModelLoadError: the kind is unknown, or factors are no numbers above 0.
    """
    key = "rope_scaling" if r.get("rope_scaling", dict, None) else "rope_parameters"
    parameters = r.get(key, dict, {})
    rope = Reader(parameters, f"{r.where}: {key}")
    theta = rope.number("rope_theta", None) or r.number("rope_theta", 10_000.0)
    if not 1e-3 <= theta <= 1e30:
        raise r.fail(f"rope_theta is {theta:g}, which is out of range")
    partial = rope.number("partial_rotary_factor", r.number("partial_rotary_factor", 1.0))
    if partial != 1.0:
        raise r.fail(
            f"partial_rotary_factor is {partial:g}; rotary embeddings over a part of the head are not supported"
        )
    kind = parameters.get("rope_type", parameters.get("type")) or "default"
    if kind not in _KINDS:
        raise r.fail(f"rope_type {short(kind)} is not supported; known: {', '.join(_KINDS)}")
    for key, value in parameters.items():
        if isinstance(value, dict) or (key in _NOT_COMPUTED and value is not None):
            raise rope.fail(f"{short(key)} is not supported with rope_type {kind}")
    if kind == "default":
        return theta, None
    if kind == "dynamic":  # changes nothing up to the positions of the training, and no more are served
        rope.number("factor")
        return theta, None
    if kind == "linear":
        scaling = RopeScaling("linear", rope.number("factor"))
    else:
        scaling = _trained_shorter(r, rope, kind, max_position)
    if fault := scaling.fault(theta):
        raise rope.fail(fault)
    return theta, scaling


def _trained_shorter(r: Reader, rope: Reader, kind: Any, max_position: int) -> RopeScaling:
    """llama3 and yarn, which say for how many positions the model was trained; beside the scaling, that counts more."""
    original = r.size("original_max_position_embeddings", rope.size("original_max_position_embeddings", max_position))
    if kind == "llama3":
        low, high = rope.number("low_freq_factor"), rope.number("high_freq_factor")
        return RopeScaling("llama3", rope.number("factor"), original, low, high)
    if "factor" in rope.values and rope.values["factor"] is None:
        factor = max_position / original
    else:
        factor = rope.number("factor")
    return RopeScaling(
        "yarn",
        factor,
        original,
        beta_fast=rope.number("beta_fast", 32.0),
        beta_slow=rope.number("beta_slow", 1.0),
        attention_factor=rope.number("attention_factor", None),
        mscale=_or_zero(rope, "mscale"),
        mscale_all_dim=_or_zero(rope, "mscale_all_dim"),
        truncate=rope.get("truncate", bool, True),
    )


def _or_zero(rope: Reader, key: str) -> float | None:
    """0 says the same as nothing."""
    return None if rope.values.get(key) == 0 else rope.number(key, None)
