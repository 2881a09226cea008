"""The ways by which bytes get from files into a device's memory: one protocol (``base``), and the choice of a backend.

direct   the built-in one: threads of O_DIRECT reads (page cache where it has the bytes), for CUDA through a ring of
         page-locked buffers with copies that overlap the reads
mmap     the plain way, for whatever the others refuse
gds      GPUDirect Storage through torch.cuda.gds; only when it is asked for
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

from instantstart_fs.errors import UsageError
from instantstart_fs.prefetch.backends.base import Backend, Refusals
from instantstart_fs.prefetch.backends.direct import DirectCpu, DirectCuda
from instantstart_fs.prefetch.backends.gds import Gds
from instantstart_fs.prefetch.backends.mapped import Mapped

NAMES = ("gds", "direct", "mmap")


def order(wanted: str) -> tuple[str, ...]:
    """The backends to try, in order, for ``auto`` or a name: one that is asked for comes first, the rest after it, so
    that a refusal costs speed and not the start. gds only when asked for. Raises UsageError."""
    if wanted == "auto":
        return ("direct", "mmap")
    if wanted not in NAMES:
        raise UsageError(f"backend {wanted!r} is none of auto, {', '.join(NAMES)}")
    return tuple(dict.fromkeys((wanted, "direct", "mmap")))


def choose(
    names: Sequence[str], device: str, readers: int, rate: float, changed: Callable[[str, Refusals], None]
) -> tuple[Backend, Refusals]:
    """The first that does not refuse, and the refusals of those before it. ``mmap`` refuses nothing that can be served
    at all. ``changed``: told the name of the backend that goes on where the chosen one fails later, and all refusals.
    Raises what makes the device itself unusable."""
    refusals: list[tuple[str, str]] = []

    def instead(reason: str) -> Backend:
        rest = [name for name in names if name != "gds"]
        other, more = choose(rest, device, readers, rate, changed)
        changed(other.name, (("gds", reason), *more))
        return other

    for name in names:
        cuda = device.startswith("cuda")
        backend: Backend
        if name == "direct":
            backend = DirectCuda(device, readers, rate) if cuda else DirectCpu(readers, rate)
        elif name == "gds":
            backend = Gds(device, instead)
        else:
            backend = Mapped(device, rate)
        reason = backend.refusal()
        if isinstance(backend, DirectCuda) and backend.lacked is not None and reason is None:
            refusals.append(backend.lacked)
        if reason is None:
            return backend, tuple(refusals)
        refusals.append((name, reason))
    raise UsageError("; ".join(f"{name}: {reason}" for name, reason in refusals))
