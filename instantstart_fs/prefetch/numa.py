"""Binds a worker to the processors beside its GPU, on hosts of several NUMA nodes.

Page-locked memory lies on the node whose processor asked for it: on the other one each byte crosses the link between
them twice, once as it is read and once on its way to the GPU.
"""

from __future__ import annotations

import contextlib
import os
from pathlib import Path
from typing import Any

FEWEST = 4
"""Processors that must be left: fewer readers at a time cost more than a remote node does."""


def bind(properties: Any, root: str = "/sys") -> frozenset[int]:
    """Let all threads that this process starts from now on run beside the device; which processors those are, empty
    where nothing was changed: one node, a GPU whose place is unknown, too few processors allowed there.

    Args:
        properties: of the device, by torch, of which older releases do not tell its place.
    """
    with contextlib.suppress(OSError, ValueError, AttributeError):
        nodes = list(Path(root, "devices/system/node").glob("node[0-9]*"))
        place = f"{properties.pci_domain_id:04x}:{properties.pci_bus_id:02x}:{properties.pci_device_id:02x}.0"
        beside = Path(root, "bus/pci/devices", place)
        if len(nodes) < 2 or int((beside / "numa_node").read_text()) < 0:
            return frozenset()
        wanted = _numbers((beside / "local_cpulist").read_text()) & os.sched_getaffinity(0)
        if len(wanted) >= FEWEST:
            os.sched_setaffinity(0, wanted)
            return frozenset(wanted)
    return frozenset()


def _numbers(text: str) -> set[int]:
    """The numbers of "0-3,8". Raises ValueError."""
    found: set[int] = set()
    for part in text.strip().split(","):
        first, _, last = part.partition("-")
        found.update(range(int(first), int(last or first) + 1))
    return found
