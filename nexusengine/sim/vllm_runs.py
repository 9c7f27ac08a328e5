"""A folder of measured runs of vLLM: one folder of each, DEVICE/MODEL, and beside them the requests that were sent."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from nexusengine.errors import ConfigError
from nexusengine.profiles.geometry import MODELS
from nexusengine.sim.vllm_run import Measured, Sent, VllmSettings, read_measured, read_settings, read_workload


@dataclass(frozen=True, slots=True)
class Run:
    """A measured run.

    Attributes:
        profile: DEVICE/MODEL of the profile to replay it with.
        folder: of its measurements.
        workloads: files, of which one has its requests.
    """

    profile: str
    folder: Path
    workloads: tuple[Path, ...]

    def __str__(self) -> str:
        return f"{self.folder.parent.name}/{self.folder.name}"

    def read(self) -> tuple[list[Sent], VllmSettings, Measured]:
        """What was sent, the engines' settings, and what was measured. Raises ConfigError if no workload is its own."""
        reasons = []
        for path in self.workloads:
            sent = read_workload(path)
            try:
                return sent, read_settings(self.folder), read_measured(self.folder, sent)
            except ConfigError as error:
                reasons.append(str(error))
        raise ConfigError(f"{self.folder}: none of {len(self.workloads)} workload files is its own: {reasons[:1]}")


def runs_in(folder: str | Path) -> list[Run]:
    """The runs of a folder that has DEVICE/MODEL/requests.jsonl[.gz] and workload_*.jsonl[.gz] in it, by name.

    Raises:
        ConfigError: there is none.
    """
    at = Path(folder)
    workloads = tuple(sorted(at.glob("workload_*.jsonl*")))
    found = sorted({path.parent for path in at.glob("*/*/requests.jsonl*")})
    if not found or not workloads:
        raise ConfigError(f"{at} has no runs in it: DEVICE/MODEL/requests.jsonl and workload_*.jsonl", param="runs")
    return [Run(f"{run.parent.name.lower()}/{_model_of(run)}", run, workloads) for run in found]


def _model_of(run: Path) -> str:
    """The longest name of a known model that the folder's name begins with, for some have a suffix; or that name."""
    name = run.name.lower()
    return max((model for model in MODELS if name.startswith(model)), key=len, default=name)
