"""A model on its device: which device, types, operations and attention backend it runs with, and its weights."""

from __future__ import annotations

import os
from dataclasses import dataclass

import torch

from nexusengine.attention.base import FP8, AttentionBackend, AttentionSpec
from nexusengine.attention.registry import choose
from nexusengine.cgroup import usable_cpus
from nexusengine.config import DeviceSpec
from nexusengine.errors import ConfigError, ModelLoadError
from nexusengine.execute.base import ExecutorOptions, Progress
from nexusengine.execute.memory import wanted_length
from nexusengine.layers.choice import choose_ops
from nexusengine.loading.weights import WeightSource
from nexusengine.model_config import ModelConfig
from nexusengine.models.base import Model
from nexusengine.models.loader import WeightLoader
from nexusengine.models.registry import model_class
from nexusengine.obs.logs import get_logger

_DTYPES = {"float32": torch.float32, "float16": torch.float16, "bfloat16": torch.bfloat16}
log = get_logger("executor")


@dataclass(frozen=True, slots=True)
class LoadedModel:
    """A model whose weights are on its device.

    Attributes:
        model: the weights and how they compute.
        backend: the attention backend that was chosen; each executor makes its own from `attention_spec`.
        attention_spec: what attention is computed of and on.
        cache_dtype: of K and V.
        max_positions: the longest sequence the model was loaded for, in tokens.
    """

    model: Model
    backend: type[AttentionBackend]
    attention_spec: AttentionSpec
    cache_dtype: torch.dtype
    max_positions: int


def load_model(
    config: ModelConfig,
    source: WeightSource | None,
    device: DeviceSpec,
    options: ExecutorOptions,
    progress: Progress,
) -> LoadedModel:
    """Choose what the model runs with, and bring its weights to the device.

    Args:
        config: of the model.
        source: the weights; None: random ones from `options.seed`.
        device: where it is to run.
        options: what the user decided.
        progress: told how far loading is.

    Raises:
        ModelLoadError: naming the tensor at fault, or how much memory is lacking.
        ConfigError: naming the setting that cannot be met.
    """
    where = torch_device(device)
    dtype = _dtype(options.dtype, config.dtype, where)
    longest = wanted_length(config, options)
    if longest == config.sliding_window and longest < config.max_position:
        log.warning(
            "prompt + output are limited to %d tokens: more needs sliding-window attention, which is not supported",
            longest,
        )
    if where.type == "cpu":
        progress("preparing the CPU kernels (the first time, they are compiled)", 0.0)
    kv_dtype = FP8 if options.fp8_kv else None
    wanted = AttentionSpec(
        config.num_heads, config.num_kv_heads, config.head_dim, dtype, where, 1, config.head_dim**-0.5,
        kv_dtype=kv_dtype,
    )  # fmt: skip
    backend, attention_spec, passed_over = choose(wanted, options.attention_backend, options.block_size)
    for name, reason in passed_over:
        log.info("attention backend %s is passed over: %s", name, reason)
    ops = choose_ops(where, dtype, config.rms_norm_eps, options.quantization, config.stored)
    kept = ops.cache_dtype if backend.name == "cpu" else None
    loader = WeightLoader(
        config,
        source,
        dtype=dtype,
        device=where,
        seed=options.seed,
        ops=ops,
        scaled_kv=options.fp8_kv,
        progress=lambda fraction: progress(source.phase() if source else "loading weights", fraction),
    )
    model = _make_model(loader, longest, device)
    return LoadedModel(model, backend, attention_spec, attention_spec.kv_dtype or kept or dtype, longest)


def _make_model(loader: WeightLoader, max_positions: int, device: DeviceSpec) -> Model:
    config, dtype = loader.config, loader.dtype
    try:
        model = model_class(config.architecture)(loader, max_positions)
    except torch.OutOfMemoryError:
        raise ModelLoadError(
            f"the weights need about {config.num_parameters * dtype.itemsize} bytes in {dtype}, more than device "
            f"{device} has free; take a smaller model or dtype, or end what else uses the device"
        ) from None
    if config.stored is not None and not model.ops.keeps_stored:
        log.info("weights stored with 8 bits are read as %s: nothing on %s multiplies them as they are", dtype, device)
    elif unkept := model.weights.unkept:
        log.info(
            "%d maps, %s first, are read as %s: nothing multiplies them as they are stored",
            len(unkept),
            unkept[0],
            dtype,
        )
    return model


def torch_device(device: DeviceSpec) -> torch.device:
    """torch's name for a device, which is made the current one; on a CPU, torch's threads are set.

    Raises:
        ConfigError: torch does not see the device.
    """
    if device.kind == "cpu":
        if device.threads is not None:
            torch.set_num_threads(device.threads)
        elif "OMP_NUM_THREADS" not in os.environ:  # torch counts cores, not what a container may use of them
            torch.set_num_threads(min(torch.get_num_threads(), usable_cpus()))
        return torch.device("cpu")
    if not torch.cuda.is_available():
        raise ConfigError(
            f"device {device}: torch {torch.__version__} sees no CUDA device; choose cpu, or run `nexusengine doctor` "
            "to see why",
            param="devices",
        )
    if (device.index or 0) >= torch.cuda.device_count():
        raise ConfigError(
            f"there is no device {device}: torch sees {torch.cuda.device_count()} CUDA devices, counted from 0",
            param="devices",
        )
    where = torch.device("cuda", device.index or 0)
    torch.cuda.set_device(where)
    return where


def _dtype(wanted: str | None, checkpoint: str, device: torch.device) -> torch.dtype:
    if wanted not in (None, "auto"):
        return _DTYPES[wanted]
    if device.type == "cpu":
        return torch.float32
    if torch.cuda.get_device_capability(device) < (8, 0):
        return torch.float16
    return _DTYPES.get(checkpoint, torch.bfloat16) if checkpoint != "float32" else torch.bfloat16
