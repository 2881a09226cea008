"""The backend for GPUDirect Storage, by torch.cuda.gds. It is used only when asked for, and after a probe.

cuFile falls back to a compatibility mode (bounce buffers, slower than the built-in backend) without a word when its
kernel side is missing, so the probe looks for what says which way bytes would go, and such a place is refused. What no
probe sees (a filesystem that cuFile does not know) shows with the first file: then another backend goes on.
"""

from __future__ import annotations

import json
import os
import queue
import re
import threading
from collections.abc import Callable
from typing import Any, NamedTuple

from instantstart_fs.prefetch.backends.base import Backend, Item
from instantstart_fs.prefetch.device_errors import explained
from instantstart_fs.prefetch.libtorch import load_torch
from instantstart_fs.prefetch.plan import BLOCK

CUFILE_JSON = "/etc/cufile.json"
NVIDIA_FS = "/proc/driver/nvidia-fs"


class GdsProbe(NamedTuple):
    """The result of the probe. ``usable``: cuFile can be called. ``native``: the device reads the disk by itself.
    ``reason``: one line."""

    usable: bool
    native: bool
    reason: str


def probe() -> GdsProbe:
    """Find out what cuFile would do here, by its library, its configuration and its driver. Opens no CUDA context."""
    torch = load_torch()
    if not torch.cuda.is_available():
        return GdsProbe(False, False, "there is no CUDA device")
    if not hasattr(torch._C, "_gds_register_handle") or "_dummy" in repr(torch._C._gds_register_handle):
        return GdsProbe(False, False, f"torch {torch.__version__} was built without cuFile")
    compat, p2p = _configuration()
    if os.path.exists(NVIDIA_FS):
        return GdsProbe(True, True, f"{NVIDIA_FS} is there")
    if p2p:
        return GdsProbe(True, True, f"no {NVIDIA_FS}; {CUFILE_JSON} turns PCI peer-to-peer on")
    if compat:
        return GdsProbe(
            True, False, f"no {NVIDIA_FS}, so cuFile would silently use its compatibility mode (through host memory)"
        )
    return GdsProbe(False, False, f"no {NVIDIA_FS}, and {CUFILE_JSON} forbids the compatibility mode")


def _configuration() -> tuple[bool, bool]:
    """Return (compatibility mode allowed, peer-to-peer DMA on), by cufile.json, whose comments JSON does not know."""
    place = os.environ.get("CUFILE_ENV_PATH_JSON", CUFILE_JSON)
    try:
        with open(place, encoding="utf-8") as file:
            text = re.sub(r"^\s*//.*$|(?<=[\s,{])//[^\"\n]*$", "", file.read(), flags=re.MULTILINE)
        found: Any = json.loads(re.sub(r",(\s*[}\]])", r"\1", text)).get("properties", {})
        return bool(found.get("allow_compat_mode", True)), bool(found.get("use_pci_p2pdma", False))
    except (OSError, ValueError, AttributeError):
        return True, False


class Gds:
    """Reads whole files, one after another: cuFile splits and overlaps by itself. ``instead``: gives the backend that
    goes on once cuFile has failed, for a reason."""

    name = "gds"
    streams = False

    def __init__(self, device: str, instead: Callable[[str], Backend]) -> None:
        self._device = device
        self._instead = instead
        self._queue: queue.PriorityQueue[tuple[int, int, Item]] = queue.PriorityQueue()
        self._thread: threading.Thread | None = None

    def refusal(self) -> str | None:
        if not self._device.startswith("cuda"):
            return "only for CUDA devices"
        found = probe()
        return None if found.usable and found.native else found.reason

    def submit(self, item: Item, start: int = 0, end: int | None = None) -> None:
        if self._thread is None:
            self._thread = threading.Thread(target=self._run, name="gds", daemon=True)
            self._thread.start()
        self._queue.put((item.order, item.number, item))

    def _run(self) -> None:
        other: Backend | None = None
        while True:
            item = self._queue.get()[2]
            try:
                if other is None:
                    try:
                        self._read(item)
                        continue
                    except RuntimeError as error:
                        other = self._instead(f"cuFile failed at {item.path}: {explained(error)}")
                other.submit(item)
            except Exception as error:
                item.fail(error)

    def _read(self, item: Item) -> None:
        """Raises RuntimeError where cuFile cannot."""
        torch = load_torch()
        torch.cuda.set_device(self._device)
        if item.direct is None:
            raise RuntimeError("its filesystem knows no O_DIRECT")
        end = spoil_end(torch, item)
        torch.cuda.synchronize()
        load(torch, item.direct, item.target)
        torch.cuda.synchronize()
        check_end(torch, item, end)
        item.moved(0, item.size)


def spoil_end(torch: Any, item: Item) -> Any:
    """The file's last block as a tensor. Its inverse is written where it belongs: freed memory may have it already."""
    count = min(item.size, BLOCK)
    end = torch.frombuffer(bytearray(os.pread(item.plain, count, item.size - count)), dtype=torch.uint8)
    item.target[item.size - count :].copy_(~end)
    return end


def check_end(torch: Any, item: Item, end: Any) -> None:
    """torch does not tell how much cuFile read. Raises RuntimeError when the file's last block is not there."""
    if not torch.equal(item.target[item.size - len(end) :].cpu(), end):
        raise RuntimeError("cuFile did not read all of it")


def load(torch: Any, direct: int, target: Any) -> None:
    """Fill ``target`` from the start of the file. torch's own GdsFile opens by name, which a tenant may not."""
    handle = torch._C._gds_register_handle(direct)
    try:
        torch._C._gds_load_storage(handle, target.untyped_storage(), 0)
    finally:
        torch._C._gds_deregister_handle(handle)
