"""A worker beside its GPU: bound to that NUMA node's processors, and left alone wherever that would be a guess."""

from __future__ import annotations

import os
from pathlib import Path
from types import SimpleNamespace

import pytest

from instantstart_fs.prefetch import numa

GPU = SimpleNamespace(pci_domain_id=0, pci_bus_id=0x3B, pci_device_id=0)


@pytest.mark.parametrize(
    ("nodes", "node", "cpus", "allowed", "gpu", "bound"),
    [
        (2, "1", "8-15,24", range(32), GPU, {*range(8, 16), 24}),
        (2, "1", "8-15", range(4, 13), GPU, {8, 9, 10, 11, 12}),
        (2, "1", "8-15", range(10), GPU, None),
        (1, "0", "0-15", range(16), GPU, None),
        (2, "-1", "0-15", range(16), GPU, None),
        (2, "1", "", range(16), GPU, None),
        (2, "1", "8-15", range(16), SimpleNamespace(), None),
    ],
    ids=["two nodes", "a part of it", "too few there", "one node", "unknown to the kernel", "none", "unknown to torch"],
)
def test_a_worker_runs_beside_its_gpu(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, nodes: int, node: str, cpus: str, allowed: range,
    gpu: SimpleNamespace, bound: set[int] | None,
) -> None:  # fmt: skip
    for number in range(nodes):
        (tmp_path / f"devices/system/node/node{number}").mkdir(parents=True)
    device = tmp_path / "bus/pci/devices/0000:3b:00.0"
    device.mkdir(parents=True)
    (device / "numa_node").write_text(f"{node}\n")
    (device / "local_cpulist").write_text(f"{cpus}\n")
    asked: list[set[int]] = []
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: set(allowed))
    monkeypatch.setattr(os, "sched_setaffinity", lambda _, wanted: asked.append(set(wanted)))
    assert numa.bind(gpu, str(tmp_path)) == (bound or set())
    assert asked == ([bound] if bound else [])
