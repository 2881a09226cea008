"""MemAvailable and every enclosing memory cgroup, from files as the kernel writes them."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

from instantstart_fs.config.memory import Memory, read_memory
from instantstart_fs.prefetch import memory as weights

GIB = 1 << 30
V2_MOUNT = "30 23 0:26 {root} /sys/fs/cgroup rw,nosuid shared:4 - cgroup2 cgroup2 rw,nsdelegate"
V1_MOUNT = "35 31 0:32 {root} /sys/fs/cgroup/memory rw,relatime - cgroup cgroup rw,memory"


def machine(root: Path, cgroup: str, mountinfo: str, files: Mapping[str, str] = {}, *, active: bool = False) -> Memory:
    """``files``: path below /sys/fs/cgroup and content."""
    (root / "proc/self").mkdir(parents=True)
    (root / "proc/meminfo").write_text("MemTotal:       16 kB\nMemAvailable:   8388608 kB\n")
    (root / "proc/self/cgroup").write_text(cgroup)
    (root / "proc/self/mountinfo").write_text(mountinfo + "\n")
    for name, content in files.items():
        path = root / "sys/fs/cgroup" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(content)
    return read_memory(str(root), active=active)


def test_without_cgroups_only_the_machine_counts(tmp_path: Path) -> None:
    assert machine(tmp_path, "", "") == Memory(8 * GIB)


def test_v2_looks_at_each_level_and_counts_reclaimable_cache_as_free(tmp_path: Path) -> None:
    unit = "system.slice/instantstart.service"
    files = {
        f"{unit}/memory.max": f"{4 * GIB}\n",
        f"{unit}/memory.high": f"{3 * GIB}\n",
        f"{unit}/memory.current": f"{2 * GIB}\n",
        f"{unit}/memory.stat": f"anon 5\ninactive_file {GIB}\n",
        "system.slice/memory.max": "max\n",
        "system.slice/memory.high": "max\n",
        "system.slice/memory.current": f"{2 * GIB}\n",
        "memory.max": f"{6 * GIB}\n",
        "memory.current": f"{6 * GIB}\n",
    }
    found = machine(tmp_path, f"0::/{unit}\n", V2_MOUNT.format(root="/"), files)
    assert found == Memory(8 * GIB, (2 * GIB, 0))


def test_v1_in_a_container_that_sees_only_its_own_cgroup(tmp_path: Path) -> None:
    files = {
        "memory/memory.limit_in_bytes": f"{GIB}\n",
        "memory/memory.usage_in_bytes": f"{GIB // 4}\n",
        "memory/memory.stat": "inactive_file 7\ntotal_inactive_file 0\n",
    }
    own = "9:name=systemd:/docker/abc\n4:memory:/docker/abc\n0::/\n"
    assert machine(tmp_path, own, V1_MOUNT.format(root="/docker/abc"), files) == Memory(8 * GIB, (GIB - GIB // 4,))


def test_v1_without_a_limit_limits_nothing(tmp_path: Path) -> None:
    files = {"memory/memory.limit_in_bytes": "9223372036854771712\n", "memory/memory.usage_in_bytes": "1000\n"}
    assert machine(tmp_path, "4:memory:/\n", V1_MOUNT.format(root="/"), files) == Memory(8 * GIB)


def test_page_cache_in_use_counts_as_free_for_weights_alone(tmp_path: Path) -> None:
    files = {
        "memory.max": f"{6 * GIB}\n",
        "memory.current": f"{5 * GIB}\n",
        "memory.stat": f"anon {GIB}\ninactive_file {GIB}\nactive_file {3 * GIB}\n",
    }
    for active, left in ((False, 2 * GIB), (True, 5 * GIB)):
        root = tmp_path / str(active)
        found = machine(root, "0::/\n", V2_MOUNT.format(root="/"), files, active=active)
        assert found == Memory(8 * GIB, (left,))
        assert weights.available(str(root)) == int(0.9 * 5 * GIB)
    v1 = {
        "memory/memory.limit_in_bytes": f"{2 * GIB}\n",
        "memory/memory.usage_in_bytes": f"{GIB}\n",
        "memory/memory.stat": "active_file 9\ntotal_inactive_file 1\ntotal_active_file 2\n",
    }
    found = machine(tmp_path / "v1", "4:memory:/\n", V1_MOUNT.format(root="/"), v1, active=True)
    assert found == Memory(8 * GIB, (GIB + 3,))


def test_what_cannot_be_read_limits_nothing(tmp_path: Path) -> None:
    assert read_memory(str(tmp_path)).available > 1 << 50
    assert weights.available(str(tmp_path)) > 1 << 50


def test_this_machine() -> None:
    assert read_memory().available > 0
