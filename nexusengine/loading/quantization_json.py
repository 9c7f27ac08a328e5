"""quantization_config of a config.json -> StoredWeights: which of the published ways of storing weights it is.

Read are `fp8` (a scale for each map, or for blocks as in Qwen3-FP8 and DeepSeek-V3), `fbgemm_fp8`, `compressed-tensors`
where its weights are 8-bit floats, `awq` and `gptq`. What else there is is refused by name.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

from nexusengine.errors import ModelLoadError
from nexusengine.loading.shown import short, word
from nexusengine.model_config import StoredWeights

_ONLINE = re.compile(r"transform|rotat|hadamard", re.IGNORECASE)


def stored_weights(values: Mapping[str, Any] | None, where: str) -> StoredWeights | None:
    """The form in which a checkpoint stores its weights; None where it says nothing: plain numbers.

    Raises:
        ModelLoadError: naming what cannot be read.
    """
    if values is None:
        return None
    method = values.get("quant_method", "unknown")
    where = f"{where}: quantization_config"
    for key, value in values.items():
        if value and _ONLINE.search(key):
            raise ModelLoadError(
                f"{where} ({word(method)}): {key} asks for transforms of the activations while the model runs "
                "(rotations, as of QuIP and SpinQuant), which are not supported"
            )
    if method == "fp8":
        if (fmt := values.get("fmt", "e4m3")) != "e4m3":
            raise ModelLoadError(f"{where}: fmt is {short(fmt)}; 8-bit floats are read as e4m3 only")
        return StoredWeights("fp8", _block(values.get("weight_block_size"), f"{where}: weight_block_size"))
    if method == "fbgemm_fp8":
        return StoredWeights("fp8")
    if method == "compressed-tensors":
        return _compressed(values, where)
    if method in ("awq", "gptq"):
        return _packed(method, values, where)
    raise ModelLoadError(
        f"{where} ({word(method)}) is not supported; read are fp8, fbgemm_fp8, compressed-tensors of 8-bit floats, "
        "awq and gptq, or take an unquantised checkpoint"
    )


def _compressed(values: Mapping[str, Any], where: str) -> StoredWeights:
    sparsity = values.get("sparsity_config")
    if isinstance(sparsity, dict) and sparsity.get("format", "dense") != "dense":
        raise ModelLoadError(f"{where} (compressed-tensors): sparsity_config is {short(sparsity)}; only dense is read")
    groups = values.get("config_groups")
    found = set()
    for name, group in (groups if isinstance(groups, dict) else {}).items():
        weights = group.get("weights") if isinstance(group, dict) else None
        if not isinstance(weights, dict):
            raise ModelLoadError(f"{where}: {name} says nothing of its weights")
        kind, bits, strategy = weights.get("type"), weights.get("num_bits"), weights.get("strategy")
        if (kind, bits) != ("float", 8) or strategy not in ("tensor", "channel", "block"):
            raise ModelLoadError(
                f"{where} (compressed-tensors): {name} has weights of type {word(kind)} with {short(bits)} bits by "
                f"{word(strategy)}; read are floats of 8 bits by tensor, channel or block"
            )
        shape = weights.get("block_structure") if strategy == "block" else None
        found.add(_block(shape, f"{where}: {name}: block_structure"))
    if len(found) != 1:
        raise ModelLoadError(f"{where} (compressed-tensors): {len(found)} ways of storing weights; one is read")
    return StoredWeights("fp8", found.pop())


def _packed(method: Any, values: Mapping[str, Any], where: str) -> StoredWeights:
    bits, group = values.get("bits", values.get("w_bit")), values.get("group_size", values.get("q_group_size", -1))
    for key, value, least in (("bits", bits, 2), ("group_size", group, -1)):
        if not isinstance(value, int) or isinstance(value, bool) or value < least:
            raise ModelLoadError(f"{where} ({method}): {key} is {short(value)}, which is not a number of them")
    symmetric = not values.get("zero_point", True) if method == "awq" else bool(values.get("sym", True))
    layout = values.get("version") if method == "awq" else values.get("checkpoint_format", values.get("format"))
    default = "gemm" if method == "awq" else "gptq"
    return StoredWeights(
        method, None, bits, group, symmetric, bool(values.get("desc_act", False)), str(layout or default).lower()
    )


def _block(shape: Any, where: str) -> tuple[int, int] | None:
    if shape is None:
        return None
    if not isinstance(shape, list) or len(shape) != 2 or not all(isinstance(n, int) and n > 0 for n in shape):
        raise ModelLoadError(f"{where} is {short(shape)}; two sizes are needed")
    return shape[0], shape[1]
