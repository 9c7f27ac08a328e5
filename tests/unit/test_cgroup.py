"""What a container leaves its processes, read from trees like those of the kernel's two versions of control groups."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from nexusengine.cgroup import Limits, limits, usable_cpus
from nexusengine.execute import memory

GIB = 2**30
UNLIMITED_V1 = "9223372036854771712"


def tree(root: Path, groups: str, **files: str) -> Path:
    """A root folder: /proc/self/cgroup, and files under /sys/fs/cgroup, `__` for `/` in their names."""
    (root / "proc/self").mkdir(parents=True)
    (root / "proc/self/cgroup").write_text(groups)
    for name, content in files.items():
        path = root / "sys/fs/cgroup" / name.replace("__", "/")
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(content + "\n")
    for folder in [root / "sys/fs/cgroup", *(root / "sys/fs/cgroup").rglob("*")]:
        if folder.is_dir():
            (folder / "cgroup.procs").write_text("")
    return root


def test_a_container_of_version_2_that_sees_itself_as_the_root(tmp_path: Path) -> None:
    files = {"memory.max": str(2 * GIB), "memory.high": "max", "memory.current": str(GIB), "cpu.max": "150000 100000"}
    root = tree(tmp_path, "0::/\n", **files, **{"memory.stat": f"anon 5\ninactive_file {GIB // 2}\nactive_file 9"})
    assert limits(root) == Limits(2 * GIB, 2 * GIB - GIB // 2, 1.5)
    assert usable_cpus(root) == 1


def test_memory_high_limits_too(tmp_path: Path) -> None:
    files = {"memory.max": str(4 * GIB), "memory.high": str(3 * GIB), "memory.current": str(GIB)}
    assert limits(tree(tmp_path, "0::/\n", **files)) == Limits(3 * GIB, 2 * GIB, None)


def test_the_least_of_a_group_and_its_ancestors_counts(tmp_path: Path) -> None:
    root = tree(
        tmp_path,
        "0::/user.slice/job/step\n",
        **{
            "user.slice__memory.max": str(8 * GIB),
            "user.slice__memory.current": str(7 * GIB),
            "user.slice__cpu.max": "max 100000",
            "user.slice__job__memory.max": str(4 * GIB),
            "user.slice__job__memory.current": str(2 * GIB),
            "user.slice__job__cpu.max": "400000 100000",
            "user.slice__job__step__memory.max": "max",
            "user.slice__job__step__cpu.max": "800000 100000",
        },
    )
    assert limits(root) == Limits(4 * GIB, GIB, 4.0)


def test_version_1_with_controllers_in_folders_of_their_own(tmp_path: Path) -> None:
    root = tree(
        tmp_path,
        "5:memory:/docker/ab\n4:cpu,cpuacct:/docker/ab\n1:name=systemd:/docker/ab\n0::/\n",
        **{
            "memory__memory.limit_in_bytes": UNLIMITED_V1,
            "memory__docker__ab__memory.limit_in_bytes": str(GIB),
            "memory__docker__ab__memory.usage_in_bytes": str(GIB // 2),
            "memory__docker__ab__memory.stat": f"inactive_file 7\ntotal_inactive_file {GIB // 4}",
            "cpu,cpuacct__cpu.cfs_quota_us": "-1",
            "cpu,cpuacct__cpu.cfs_period_us": "100000",
            "cpu,cpuacct__docker__ab__cpu.cfs_quota_us": "250000",
            "cpu,cpuacct__docker__ab__cpu.cfs_period_us": "100000",
        },
    )
    assert limits(root) == Limits(GIB, 3 * GIB // 4, 2.5)


@pytest.mark.parametrize("groups", ["0::/kubepods/pod1/ab\n", "0::/../other\n"])
def test_a_path_of_the_host_that_is_not_mounted_falls_back_to_what_is(tmp_path: Path, groups: str) -> None:
    assert limits(tree(tmp_path, groups, **{"memory.max": str(GIB)})) == Limits(GIB, GIB, None)


def test_version_1_without_limits_and_no_control_groups_at_all(tmp_path: Path) -> None:
    files = {"memory__memory.limit_in_bytes": UNLIMITED_V1, "cpu__cpu.cfs_quota_us": "-1"}
    root = tree(tmp_path / "one", "4:memory:/\n3:cpu:/\n", **files)
    assert limits(root) == limits(tmp_path / "none") == Limits()
    assert usable_cpus(root) == len(os.sched_getaffinity(0))


def test_less_than_one_processor_is_one_thread(tmp_path: Path) -> None:
    assert usable_cpus(tree(tmp_path, "0::/\n", **{"cpu.max": "20000 100000"})) == 1


def test_the_kv_cache_is_bounded_by_the_container(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    files = {"memory.max": str(GIB), "memory.current": str(GIB // 2)}
    root = tree(tmp_path, "0::/\n", **files)
    (root / "proc/meminfo").write_text(f"MemTotal: {64 * GIB // 1024} kB\nMemAvailable: {32 * GIB // 1024} kB\n")
    assert memory.available_bytes(root) == GIB // 2
    (root / "proc/meminfo").write_text(f"MemAvailable: {GIB // 4 // 1024} kB\n")
    assert memory.available_bytes(root) == GIB // 4, "the machine has less than the container may take"
    monkeypatch.setattr(memory, "available_bytes", lambda: GIB // 2)
    assert memory.cpu_kv_bytes() == int(0.4 * (GIB // 2))
