"""`nexusengine doctor`: what this machine has, what will be used of it, and what would make it faster."""

from __future__ import annotations

import argparse
import dataclasses
import importlib.metadata
import json
import os
import platform
from pathlib import Path
from typing import Any

from nexusengine import __version__
from nexusengine import nvml as gpus

_PACKAGES = ("torch", "triton", "flash-attn", "flash-attn-4", "flashinfer-python", "gptqmodel", "nvidia-ml-py", "numpy")
_HEADS, _KV_HEADS, _HEAD_DIM = 32, 8, 128  # the shape backends are asked for: Llama 3 8B's


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--json", action="store_true", help="print one JSON object")


def run(args: argparse.Namespace) -> int:
    found = findings()
    print(json.dumps(found, indent=2) if args.json else text(found))
    return 0


def findings(cpu_kernels: bool = True) -> dict[str, Any]:
    """Everything that is printed. Never raises for what is missing: that is a finding.

    Args:
        cpu_kernels: compile the CPU kernels, where they are not yet, to tell whether they can be used.
    """
    driver, no_driver = gpus.driver_version()
    there = gpus.visible()
    torch = _torch()
    backends = _backends(torch)
    return {
        "nexusengine": __version__,
        "python": platform.python_version(),
        "versions": {name: _version(name) for name in _PACKAGES},
        "driver": {"version": driver or None, "reason": no_driver or None},
        "torch": torch,
        "gpus": [{**dataclasses.asdict(g), "memory": _ledger(g)} for g in there],
        "topology": gpus.topology(there),
        "cpu": _cpu(cpu_kernels),
        "attention": backends,
        "advice": advice(len(there), no_driver, torch, backends),
    }


def advice(count: int, no_driver: str, torch: dict[str, Any], backends: list[dict[str, Any]]) -> list[str]:
    """Things to install or repair for more speed."""
    found: list[str] = []
    if not count:
        why = f"the NVIDIA driver does not answer ({no_driver})" if no_driver else "CUDA_VISIBLE_DEVICES hides them all"
        return [f"no GPU can be used: {why}; steps run on the CPU"]
    if not torch["cuda"]:
        found.append(f"torch {torch['version']} was built without CUDA: install a CUDA build of it")
    fast = ("flash2", "flash3", "flash4", "flashinfer", "torch-varlen")
    if not any(b["available"] for b in backends if b["name"] in fast):
        found.append("no FlashAttention kernel is installed: pip install flash-attn --no-build-isolation")
    return found


def text(found: dict[str, Any]) -> str:
    lines = [f"nexusengine {found['nexusengine']}, Python {found['python']}"]
    lines += [f"  {name:18} {version or 'not installed'}" for name, version in found["versions"].items()]
    driver = found["driver"]
    lines += ["", f"NVIDIA driver: {driver['version'] or 'none, ' + driver['reason']}"]
    for i, gpu in enumerate(found["gpus"]):
        major, minor = gpu["compute_capability"]
        free, total = gpu["free_bytes"] / 2**30, gpu["total_bytes"] / 2**30
        lines.append(f"  cuda:{i}  {gpu['name']}, sm_{major}{minor}, {free:.1f} of {total:.1f} GiB free, {gpu['uuid']}")
        where = "unknown" if gpu["numa_node"] < 0 else gpu["numa_node"]
        parts = ", ".join(f"{name} {size / 2**30:.1f}" for name, size in gpu["memory"].items())
        lines += [f"          NUMA node {where}, PCI {gpu['pci']}", f"          GiB with no model loaded: {parts}"]
    lines += [f"  cuda:{i} reaches: {' '.join(row)}" for i, row in enumerate(found["topology"])]
    cpu = found["cpu"]
    kernels = "compiled kernels" if cpu["kernels"] else "no compiled kernels"
    lines += ["", f"CPU: {cpu['threads']} threads, {cpu['available_bytes'] / 2**30:.1f} GiB available"]
    memory, cpus = cpu["cgroup"]["memory_bytes"], cpu["cgroup"]["cpus"]
    said = [f"{memory / 2**30:.1f} GiB of memory"] if memory is not None else []
    said += [f"{cpus:g} of {cpu['cores']} cores"] if cpus is not None else []
    lines += [f"  limited by control groups to {' and '.join(said)}"] if said else []
    lines += [f"  {kernels}: {cpu['kernels_reason']}", "", f"Attention backends on {found['torch']['device']}:"]
    for b in found["attention"]:
        lines.append(f"  {'yes' if b['available'] else 'no ':3} {b['name']:14} {b['reason']}")
    if found["advice"]:
        lines += ["", "For more speed:", *(f"  {line}" for line in found["advice"])]
    return "\n".join(lines)


def _version(name: str) -> str | None:
    try:
        return importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        return None


def _torch() -> dict[str, Any]:
    try:
        import torch
    except ImportError as error:
        return {"version": None, "cuda": None, "device": "nothing", "reason": str(error)}
    usable = torch.cuda.is_available()
    return {"version": torch.__version__, "cuda": torch.version.cuda, "device": "cuda:0" if usable else "cpu"}


def _backends(torch_found: dict[str, Any]) -> list[dict[str, Any]]:
    """Every backend there is, whether it could run a model of a common shape here, and why or why not."""
    if torch_found["version"] is None:
        return []
    import torch

    from nexusengine.attention.base import AttentionSpec
    from nexusengine.attention.registry import BACKENDS, backend_class

    device = torch.device(torch_found["device"])
    dtype = torch.float32
    if device.type == "cuda":
        dtype = torch.bfloat16 if torch.cuda.get_device_capability(device) >= (8, 0) else torch.float16
    found = []
    for name in BACKENDS:
        try:
            cls = backend_class(name)
            caps = cls.caps()
            spec = AttentionSpec(
                _HEADS, _KV_HEADS, _HEAD_DIM, dtype, device, caps.block_sizes[0], scale=_HEAD_DIM**-0.5
            )
            available, reason = cls.supports(spec)
            if available:
                available, reason = cls.probe()
            found.append(
                {"name": name, "available": available, "reason": reason, "block_size": caps.block_sizes[0],
                 "graphs": caps.graphs}
            )  # fmt: skip
        except Exception as error:  # a package that is there and broken; its words are what the user needs
            found.append({"name": name, "available": False, "reason": f"{type(error).__name__}: {error}"})
    return found


def _cpu(look_at_kernels: bool) -> dict[str, Any]:
    from nexusengine import native
    from nexusengine.cgroup import limits, usable_cpus
    from nexusengine.errors import NexusError
    from nexusengine.execute.memory import available_bytes

    kernels, reason = native.probe() if look_at_kernels else (False, "not looked at")
    try:
        memory = available_bytes()
    except NexusError:
        memory = 0
    nodes = len(list(Path("/sys/devices/system/node").glob("node[0-9]*")))
    return {
        "threads": usable_cpus(),
        "cores": len(os.sched_getaffinity(0)),
        "cgroup": dataclasses.asdict(limits()),
        "numa_nodes": nodes,
        "available_bytes": memory,
        "kernels": kernels,
        "kernels_reason": reason,
    }


def _ledger(gpu: gpus.Gpu) -> dict[str, int]:
    """What there would be for a model: the worker's log says how it is divided once one is loaded."""
    from nexusengine.execute.memory import RESERVE_SHARE, graph_budget_bytes

    reserve, graphs = int(RESERVE_SHARE * gpu.total_bytes), graph_budget_bytes(gpu.total_bytes)
    return {
        "total": gpu.total_bytes,
        "other": gpu.total_bytes - gpu.free_bytes,
        "reserve": reserve,
        "graphs": graphs,
        "weights, activations and kv": max(gpu.free_bytes - reserve - graphs, 0),
    }
