"""The processes that should be running: what each is, and what it needs of its surroundings."""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from enum import StrEnum

from nexusengine.config import DeviceSpec
from nexusengine.nvml import Gpu
from nexusengine.process.child import Child
from nexusengine.process.control import Boot, ToChild
from nexusengine.supervisor.cores import numa_nodes, place_workers
from nexusengine.worker.gpu import PINNED


class RoleKind(StrEnum):
    """The kinds of processes."""

    ROUTER = "router"
    SERVER = "server"
    WORKER = "worker"


_MODULES = {
    RoleKind.ROUTER: "nexusengine.router.broker",
    RoleKind.SERVER: "nexusengine.server.main",
    RoleKind.WORKER: "nexusengine.worker.worker",
}


@dataclass(slots=True)
class Role:
    """One process that should be running.

    Attributes:
        name: "router", "server", or the worker's id.
        boot: makes the first line to a new process.
        environ: added to the environment of a new process.
        child: the process that runs, if one does.
        epoch: of the worker process that runs, or is started next.
        was_ready: whether some process of it was ready.
        waiting_since_s: timestamp from which it has had all that it needs to become ready.
        failing_since_s: timestamp at which it said that it failed; it is to end by itself.
        start_again_s: timestamp at which it is to be started again.
        restarts: timestamps of the newest.
    """

    kind: RoleKind
    name: str
    boot: Callable[[], Boot]
    environ: dict[str, str] = field(default_factory=dict)
    module: str = ""
    child: Child | None = None
    epoch: str = ""
    was_ready: bool = False
    waiting_since_s: float | None = None
    failing_since_s: float | None = None
    start_again_s: float | None = None
    restarts: list[float] = field(default_factory=list)

    def __post_init__(self) -> None:
        self.module = self.module or _MODULES[self.kind]

    @property
    def is_worker(self) -> bool:
        return self.kind is RoleKind.WORKER

    def send(self, message: ToChild) -> None:
        """Send a control message to its process, if one runs."""
        if self.child is not None:
            self.child.send(message)


def worker_environ(device: DeviceSpec, gpus: tuple[Gpu, ...]) -> dict[str, str]:
    """The environment that has to be set before torch is imported.

    A CPU worker: its thread count, and that torch does not spin after computing, beside the kernels. A GPU's: that GPU
    alone, by its UUID, so that nothing depends on the order in which libraries count them; there it is device 0.

    Args:
        gpus: by index; where the driver does not show the device, the worker sees them all and says itself what is
            wrong.
    """
    if device.kind == "cpu":
        count = {"OMP_NUM_THREADS": str(device.threads)} if device.threads else {}
        return count if "OMP_WAIT_POLICY" in os.environ else count | {"OMP_WAIT_POLICY": "passive"}
    if device.kind == "cuda" and (device.index or 0) < len(gpus):
        return {"CUDA_VISIBLE_DEVICES": gpus[device.index or 0].uuid, PINNED: "1"}
    return {}


def worker_cores(devices: Sequence[DeviceSpec]) -> dict[str, tuple[int, ...]]:
    """The cores of each CPU worker that is bound to some, by its id."""
    workers = [i for i, device in enumerate(devices) if device.kind == "cpu"]
    placed = place_workers([devices[i].threads for i in workers], sorted(os.sched_getaffinity(0)), numa_nodes())
    return {f"w{i}": cores for i, cores in zip(workers, placed, strict=True) if cores}
