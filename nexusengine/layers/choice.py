"""Which table of operations a model computes with, and what is lost where it is not the best one."""

from __future__ import annotations

from typing import Any

import torch

from nexusengine import native
from nexusengine.config import Quantization
from nexusengine.errors import ConfigError
from nexusengine.layers.ops import Ops, TorchOps
from nexusengine.layers.packed import PackedMaps, check
from nexusengine.model_config import StoredWeights
from nexusengine.obs.logs import get_logger
from nexusengine.triton_kernels import launch

log = get_logger("ops")


def choose_ops(
    device: torch.device,
    dtype: torch.dtype,
    eps: float,
    quantization: Quantization = "none",
    stored: StoredWeights | None = None,
) -> Ops[Any]:
    """Choose the CPU kernels or, on CUDA, the Triton kernels where they can run; else torch, and log why.

    Args:
        device: where the model is.
        dtype: it computes in.
        eps: of RMS norms.
        quantization: of the weights, by the CPU kernels.
        stored: how the checkpoint stores its weights.

    Raises:
        ConfigError: torch's table does not have the quantization.
        ModelLoadError: nothing here computes with the stored weights.
    """
    packed = None
    if stored is not None and stored.method != "fp8":
        check(stored, device)
        packed = PackedMaps(dtype, device)
    if device.type != "cpu":
        reason = f"the device is {device}"
    elif dtype != torch.float32:
        reason = f"they compute in float32, not in {dtype}"
        log.info("the CPU kernels are not used: %s", reason)
    else:
        available, reason = native.probe()
        if available:
            return _native_ops(eps, quantization)
        log.warning("the CPU kernels cannot be used, torch is several times slower: %s", reason)
    if quantization != "none":
        message = f"quantization {quantization} is a matter of the CPU kernels, which cannot be used: {reason}"
        raise ConfigError(message, param="quantization")
    if device.type == "cuda":
        available, reason = launch.probe(device)
        if available:
            from nexusengine.layers.triton_ops import TritonOps

            return TritonOps(eps, launch.capability(device) >= launch.FP8_CAPABILITY, packed)
        log.warning("the Triton kernels cannot be used, steps take longer: %s", reason)
    return TorchOps(eps, packed)


def _native_ops(eps: float, quantization: Quantization) -> Ops[Any]:
    from nexusengine.layers.native_ops import NativeOps

    library = native.library()
    library.set_threads(torch.get_num_threads())
    return NativeOps(eps, library, quantization)
