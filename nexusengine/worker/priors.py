"""What a worker believes of its step times before it has measured any: from device name, driver and model."""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping

from nexusengine.cgroup import usable_cpus
from nexusengine.config import parse_device
from nexusengine.execute.base import ExecutorSpec
from nexusengine.model_config import ModelConfig
from nexusengine.nvml import driver
from nexusengine.perf.devices import DATASHEETS, Datasheet, Hardware, cpu_datasheet, datasheet_from, datasheet_of
from nexusengine.perf.prior import GENERIC, Prior, roofline
from nexusengine.profiles.geometry import emulated_geometry, shards_of
from nexusengine.worker.gpu import PINNED


def hardware_of(uuid: str) -> Hardware | None:
    """Ask the driver for cores, clocks and memory bus of a GPU; None without a driver, or where it does not know it."""
    try:
        with driver() as nvml:
            handle = nvml.nvmlDeviceGetHandleByUUID(uuid)
            major, minor = nvml.nvmlDeviceGetCudaComputeCapability(handle)
            return Hardware(
                cores=int(nvml.nvmlDeviceGetNumGpuCores(handle)),
                compute_capability=(int(major), int(minor)),
                core_mhz=float(nvml.nvmlDeviceGetMaxClockInfo(handle, nvml.NVML_CLOCK_SM)),
                memory_mhz=float(nvml.nvmlDeviceGetMaxClockInfo(handle, nvml.NVML_CLOCK_MEM)),
                memory_bus_bits=int(nvml.nvmlDeviceGetMemoryBusWidth(handle)),
                consumer="geforce" in str(nvml.nvmlDeviceGetName(handle)).lower(),
            )
    except Exception:  # not every GPU tells everything; step times are then learned without
        return None


def prior_of(
    spec: ExecutorSpec,
    geometry: ModelConfig | None,
    environ: Mapping[str, str] = os.environ,
    hardware: Callable[[str], Hardware | None] = hardware_of,
) -> Prior:
    """The prior of step times: the device's datasheet and the shape of the model.

    A GPU without a datasheet here is taken for what its driver says of cores, clocks and memory bus, and a device of
    which nothing is known for a generic one. An emulated device runs the model of its profile, not the one whose
    tokenizer is served.

    Args:
        environ: of this process; names the one GPU that it sees.
        hardware: asks the driver, by the GPU's UUID.
    """
    kind, _, rest = spec.device.partition(":")
    geometry = emulated_geometry(rest) if kind == "emulated" else geometry
    if geometry is None:
        return GENERIC
    sheet: Datasheet | None
    if kind == "cpu":
        sheet = cpu_datasheet(parse_device(spec.device).threads or usable_cpus())
    elif kind == "emulated":
        sheet = _emulated(rest.partition("/")[0])
    else:
        sheet = datasheet_of(spec.device_name) or _by_driver(environ, hardware)
    if sheet is None:
        return GENERIC
    element_bytes = 4 if spec.dtype == "float32" else 2
    narrow = geometry.stored is not None or (kind == "emulated" and spec.weights_bytes > 0)
    weight_bytes = spec.weights_bytes / geometry.num_parameters if narrow else element_bytes
    return roofline(sheet, geometry, weight_bytes, 1 if spec.kv_dtype else element_bytes)


def _emulated(device: str) -> Datasheet | None:
    """Of all devices behind a profile's name, such as two of `rtxpro6000-tp2`."""
    sheet, shards = DATASHEETS.get(device.partition("-tp")[0]), shards_of(device)
    if sheet is None or shards == 1:
        return sheet
    return Datasheet(shards * sheet.bandwidth_gb_s, shards * sheet.tflops)


def _by_driver(environ: Mapping[str, str], hardware: Callable[[str], Hardware | None]) -> Datasheet | None:
    if not environ.get(PINNED):
        return None
    found = hardware(environ.get("CUDA_VISIBLE_DEVICES", ""))
    return None if found is None else datasheet_from(found)
