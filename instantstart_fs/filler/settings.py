"""The filler's settings: values only, read from the configuration by the library."""

from __future__ import annotations

import msgspec

from instantstart_fs.core.retry import Backoff
from instantstart_fs.core.trust import ServeUnsealed


class FillSettings(msgspec.Struct, frozen=True):
    """Sizes in bytes, times in seconds.

    ``connections``: concurrent fetches per origin and credentials, over all workers. ``demand_headroom``: how many more
    fetches demands may have. ``demand_pause``: how long at most background fetches leave their sockets unread for a
    demand.
    """

    workers: int = 2
    connections: int = 16
    read_deadline: float = 60.0
    serve_unsealed: ServeUnsealed = "auto"
    commit_bytes: int = 256 * 1024 * 1024
    commit_seconds: float = 1.0
    connect_timeout: float = 10.0
    stall_timeout: float = 15.0
    locate_timeout: float = 30.0
    demand_headroom: int = 4
    demand_pause: float = 2.0
    backoff: Backoff = Backoff()
