"""Which cores the CPU workers of one machine compute on, so that no two of them share one.

A worker is bound to a set of cores, as many as it has threads; the kernel moves its threads within the set. That is
done only where it settles something: several CPU workers, or several NUMA nodes.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

_NODES = Path("/sys/devices/system/node")


def place_workers(
    threads: Sequence[int | None], cores: Sequence[int], nodes: Sequence[frozenset[int]]
) -> list[tuple[int, ...]]:
    """Choose the cores of each worker, so that no two have one in common; empty for whatever the kernel takes.

    No worker is bound if a number of threads is not known, or if there are more threads than cores.

    Args:
        threads: of each CPU worker, None where it takes as many as it likes.
        cores: those that may be used.
        nodes: the cores of each NUMA node; a worker stays within one where it fits, the largest first, in the fullest
            with room.
    """
    anywhere: list[tuple[int, ...]] = [() for _ in threads]
    known = [count for count in threads if count is not None]
    if len(known) < len(threads) or sum(known) > len(cores):
        return anywhere
    free = [sorted(node.intersection(cores)) for node in nodes]
    free.append(sorted(set(cores).difference(*nodes)))
    free = [node for node in free if node]
    if len(known) < 2 and len(free) < 2:
        return anywhere
    placed = anywhere
    for worker in sorted(range(len(known)), key=lambda i: (-known[i], i)):
        count = known[worker]
        fits = [node for node in free if len(node) >= count]
        if fits:
            node = min(fits, key=len)
            placed[worker], node[:] = tuple(node[:count]), node[count:]
            continue
        taken: list[int] = []
        for node in sorted(free, key=len, reverse=True):
            missing = count - len(taken)
            taken, node[:] = taken + node[:missing], node[missing:]
        placed[worker] = tuple(taken)
    return placed


def numa_nodes(folder: Path = _NODES) -> list[frozenset[int]]:
    """The cores of each NUMA node, by its number; none where the kernel does not say."""
    lists = sorted(folder.glob("node[0-9]*/cpulist"), key=lambda path: int(path.parent.name[4:]))
    return [cores for path in lists if (cores := parse_cpulist(path.read_text()))]


def parse_cpulist(text: str) -> frozenset[int]:
    """The kernel's notation: "0-3,8" is 0, 1, 2, 3 and 8."""
    cores: set[int] = set()
    for part in filter(None, text.strip().split(",")):
        first, _, last = part.partition("-")
        cores.update(range(int(first), int(last or first) + 1))
    return frozenset(cores)
