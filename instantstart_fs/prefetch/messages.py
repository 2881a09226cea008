"""The messages between a Stage and its workers. They have no compatibility to keep: both are of one release.

One JSON object in each packet of a SOCK_SEQPACKET pair, descriptors beside it (SCM_RIGHTS).
"""

from __future__ import annotations

import msgspec

MAX_PACKET = 64 * 1024
MAX_FDS = 3
MAX_RANGES = 1000


class _Message(msgspec.Struct, frozen=True, tag=True):
    pass


class Load(_Message, frozen=True):
    """Bring this file in; its descriptors are beside it: the file, with ``direct`` the same opened O_DIRECT, and with
    ``memory`` the memfd that takes it (CPU). ``order``: lower ones first. ``lead``: bytes of device memory to leave
    free before it (CUDA). ``streaming``: only what Available names can be read."""

    number: int
    path: str
    size: int
    order: int
    direct: bool
    memory: bool
    lead: int = 0
    streaming: bool = False

    @property
    def descriptors(self) -> int:
        return 1 + self.direct + self.memory


class Available(_Message, frozen=True):
    """[start, end) of a file in bytes that can be read now; each byte is named once. At most MAX_RANGES."""

    number: int
    ranges: tuple[tuple[int, int], ...]


class Export(_Message, frozen=True):
    """Make a handle that another process can open once (CUDA). Answered by Exported."""

    number: int
    token: int


class Release(_Message, frozen=True):
    """Free this file's memory."""

    number: int


class Abandoned(_Message, frozen=True):
    """Count down a handle of this reference (CUDA): the process that it was given to has ended."""

    reference_handle: str
    reference_offset: int


class Ready(_Message, frozen=True):
    """The worker works. ``refusals``: (backend, why not) of those tried before. ``free``: bytes of device memory, None
    for the CPU, whose memory is the Stage's. ``place``: as tensors.place_of. ``streams``: it takes Available."""

    backend: str
    refusals: tuple[tuple[str, str], ...]
    free: int | None = None
    place: str = "cpu"
    streams: bool = True


class Moved(_Message, frozen=True):
    """So many more bytes of the file are in place: out of the page cache, and from the disk."""

    number: int
    cached: int
    disk: int


class Loaded(_Message, frozen=True):
    """The whole file is in place."""

    number: int


class IpcHandle(msgspec.Struct, frozen=True):
    """What torch needs to open a storage of another process. Byte strings in hexadecimal. ``place``: of the GPU, whose
    number may be another there (CUDA_VISIBLE_DEVICES)."""

    place: str
    handle: str
    size: int
    offset: int
    reference_handle: str
    reference_offset: int
    event_handle: str
    event_sync: bool
    torch: str = ""
    """The release of torch that made it."""


class Exported(_Message, frozen=True):
    number: int
    token: int
    handle: IpcHandle | None
    error: str = ""


class Collected(_Message, frozen=True):
    """Answers ``releases`` orders to Release (CUDA). ``lent``: whether another process still has released memory
    open."""

    releases: int
    lent: bool


class Failed(_Message, frozen=True):
    """A failure. ``number``: the file, or -1 for the worker. ``code``: of the error class."""

    number: int
    code: str
    message: str


class Settings(msgspec.Struct, frozen=True):
    """A worker's orders, on its command line. ``readers``: threads, 0 for the backend's own choice. ``rate``: bytes a
    second at most, 0 for no limit."""

    device: str
    backends: tuple[str, ...]
    readers: int = 0
    rate: float = 0.0


ToWorker = Load | Available | Export | Release | Abandoned
FromWorker = Ready | Moved | Loaded | Exported | Collected | Failed

encode = msgspec.json.Encoder().encode
to_worker = msgspec.json.Decoder(ToWorker)
from_worker = msgspec.json.Decoder(Ready | Moved | Loaded | Exported | Collected | Failed)
settings = msgspec.json.Decoder(Settings)
