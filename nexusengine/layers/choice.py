"""Which table of operations a model computes with, and what is lost where it is not the best one."""

from __future__ import annotations

from typing import Any

import torch

from nexusengine import native
from nexusengine.layers.ops import Ops, TorchOps
from nexusengine.obs.logs import get_logger

log = get_logger("ops")


def choose_ops(device: torch.device, dtype: torch.dtype, eps: float) -> Ops[Any]:
    """The CPU kernels where they can run; else torch, with a line in the log that says why."""
    if device.type != "cpu":
        return TorchOps(eps)
    if dtype != torch.float32:
        log.info("torch computes in %s; the CPU kernels compute in float32 only", dtype)
        return TorchOps(eps)
    available, reason = native.probe()
    if not available:
        log.warning("the CPU kernels cannot be used, torch is several times slower: %s", reason)
        return TorchOps(eps)
    from nexusengine.layers.native_ops import NativeOps

    library = native.library()
    library.set_threads(torch.get_num_threads())
    return NativeOps(eps, library)
