"""What the control groups of this process leave it: memory in bytes and processors. Versions 1 and 2. No torch.

A container's limits do not show in /proc/meminfo or in the number of cores. A group's limit holds for all below it, so
the least of a group and its ancestors counts.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

_NO_LIMIT_BYTES = 1 << 60
"""Version 1 has no word for "no limit", only a number close to the largest there is."""


@dataclass(frozen=True, slots=True)
class Limits:
    """None: nothing is limited, or the system does not say.

    Attributes:
        memory_bytes: the least memory limit.
        free_bytes: how much more memory can be had within every limit; file pages that the kernel may drop count.
        cpus: processors' worth of time, 1.5 for 150 ms in every 100 ms.
    """

    memory_bytes: int | None = None
    free_bytes: int | None = None
    cpus: float | None = None


def limits(root: Path = Path("/")) -> Limits:
    """Read the limits of this process's control groups. root: where /proc and /sys are."""
    memory = [found for folder, version in _folders(root, "memory") if (found := _memory(folder, version))]
    cpus = [paid for folder, version in _folders(root, "cpu") if (paid := _cpus(folder, version))]
    return Limits(
        memory_bytes=min((limit for limit, _ in memory), default=None),
        free_bytes=min((max(limit - used, 0) for limit, used in memory), default=None),
        cpus=min(cpus, default=None),
    )


def usable_cpus(root: Path = Path("/")) -> int:
    """Threads worth computing with.

    Cores that this process may run on, no more than its groups pay for in full, and at least one.
    """
    cores, paid = len(os.sched_getaffinity(0)), limits(root).cpus
    return cores if paid is None else max(min(cores, int(paid)), 1)


def _folders(root: Path, controller: str) -> Iterator[tuple[Path, int]]:
    """(folder, version) of the group that limits this process by `controller` and of each of its ancestors.

    In a container the path in /proc/self/cgroup may be the host's, and what is mounted is its end or the group itself;
    parts that are not there are passed over.
    """
    try:
        lines = (root / "proc/self/cgroup").read_text().splitlines()
    except OSError:
        return
    mounted = root / "sys/fs/cgroup"
    for line in lines:
        number, _, rest = line.partition(":")
        names, _, path = rest.partition(":")
        if number == "0" and not names:
            tops = [(mounted, 2), (mounted / "unified", 2)]
        elif controller in names.split(","):
            tops = [(mounted / controller, 1), (mounted / names, 1)]
        else:
            continue
        top, version = next(((top, version) for top, version in tops if _is_group(top)), (None, 0))
        if top is None:
            continue
        inside = Path(path.lstrip("/"))
        for part in (inside, *inside.parents):
            if ".." not in part.parts and (top / part).is_dir():
                yield top / part, version


def _is_group(folder: Path) -> bool:
    return (folder / "cgroup.procs").exists()


def _memory(folder: Path, version: int) -> tuple[int, int] | None:
    """(limit, used) in bytes; None without a limit."""
    names = ("memory.max", "memory.high") if version == 2 else ("memory.limit_in_bytes",)
    found = [limit for name in names if (limit := _number(folder / name)) is not None and limit < _NO_LIMIT_BYTES]
    if not found:
        return None
    used = _number(folder / ("memory.current" if version == 2 else "memory.usage_in_bytes")) or 0
    droppable = _entry(folder / "memory.stat", "inactive_file" if version == 2 else "total_inactive_file")
    return min(found), max(used - droppable, 0)


def _cpus(folder: Path, version: int) -> float | None:
    if version == 2:
        quota, _, period = _text(folder / "cpu.max").partition(" ")
    else:
        quota, period = _text(folder / "cpu.cfs_quota_us"), _text(folder / "cpu.cfs_period_us")
    if quota.isdigit() and period.isdigit() and int(quota) and int(period):
        return int(quota) / int(period)
    return None  # "max" or -1


def _number(path: Path) -> int | None:
    text = _text(path)
    return int(text) if text.isdigit() else None


def _entry(path: Path, name: str) -> int:
    for line in _text(path).splitlines():
        key, _, value = line.partition(" ")
        if key == name and value.isdigit():
            return int(value)
    return 0


def _text(path: Path) -> str:
    try:
        return path.read_text().strip()
    except OSError:
        return ""
