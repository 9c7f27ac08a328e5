"""Makes the executor of a device; each kind is imported when it is chosen. No torch here."""

from __future__ import annotations

from typing import TYPE_CHECKING

from nexusengine.config import DeviceSpec
from nexusengine.execute.base import Executor, ExecutorOptions, Progress

if TYPE_CHECKING:
    from nexusengine.loading.resolve import ModelFiles


def make_executor(
    model: ModelFiles, device: DeviceSpec, options: ExecutorOptions, progress: Progress | None = None
) -> Executor:
    """Load `model` onto `device`.

    Raises:
        ModelLoadError: naming the file at fault.
        ConfigError: naming the setting at fault.
    """
    report = progress or (lambda phase, fraction: None)
    if device.kind == "emulated":
        from nexusengine.execute.emulated import EmulatedExecutor

        emulated: Executor = EmulatedExecutor.create(model, device, options, report)
        return emulated
    report("importing torch", 0.0)
    from nexusengine.execute.torch_executor import TorchExecutor

    executor: Executor = TorchExecutor.create(model, device, options, report)
    return executor
