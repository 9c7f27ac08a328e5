"""Packages that a bare GPU image lacks: which they are, and a folder of wheels to take them from.

It imports nothing that is not part of Python.
"""

from __future__ import annotations

import importlib
import sys
import zipfile
from pathlib import Path

WHEELS = Path(__file__).resolve().parents[2] / "build" / "gpu-wheels"
"""Where scripts/gpu_wheels.sh puts them."""
NEEDED = {
    "torch": "torch",
    "numpy": "numpy",
    "msgspec": "msgspec",
    "safetensors": "safetensors",
    "triton": "triton",
}
"""Modules without which no phase runs, and the packages that have them."""


def unpack(folder: Path, into: Path) -> list[str]:
    """Unpack the wheels of a folder and put them last on the path, so that what is installed goes first.

    Args:
        folder: of wheels; it need not be there.
        into: an empty folder.

    Returns:
        Names of the wheels' files.
    """
    wheels = sorted(folder.glob("*.whl"))
    for wheel in wheels:
        with zipfile.ZipFile(wheel) as archive:
            archive.extractall(into)
    if wheels:
        sys.path.append(str(into))
        importlib.invalidate_caches()
    return [wheel.name for wheel in wheels]


def missing(needed: dict[str, str] = NEEDED) -> dict[str, str]:
    """Packages whose modules cannot be imported here, and why."""
    found = {}
    for module, package in needed.items():
        try:
            importlib.import_module(module)
        except ImportError as error:
            found[package] = str(error)
    return found


def sentence(lacking: dict[str, str], folder: Path, wheels: list[str]) -> str:
    """What is missing, and what to do about it."""
    names = ", ".join(f"{name} ({reason})" for name, reason in lacking.items())
    there = f"the {len(wheels)} wheels in {folder} do not have them" if wheels else f"there are no wheels in {folder}"
    return (
        f"Python {sys.version_info[0]}.{sys.version_info[1]} lacks {names}, and {there}: install them, or collect them "
        "with scripts/gpu_wheels.sh where there is a network and name their folder with --wheels"
    )
