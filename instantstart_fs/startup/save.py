"""Keep what an engine has compiled: a copy of its private directory, as it is now, goes to the daemon as one pack."""

from __future__ import annotations

import os
import tempfile
from typing import TYPE_CHECKING

from instantstart_fs.core.humanize import human_bytes, number_of
from instantstart_fs.errors import ControlProtocolError, InstantStartError
from instantstart_fs.startup.pack import BLOCK, TooMuch, pack, scan
from instantstart_fs.startup.wire import Wire

if TYPE_CHECKING:
    from instantstart_fs.startup.start import Start

__all__ = ["TooMuch", "save"]


def save(start: Start) -> str | None:
    """Save what the command has compiled. Returns what there is to say of it; None if the store has it all. Raises
    OSError (a full disk, say), TooMuch, InstantStartError."""
    assert start.view is not None
    seen = scan(start.view.path, start.layouts)
    if not seen or seen == start.saved:
        return None
    with tempfile.TemporaryFile(dir=os.path.dirname(start.view.path), prefix=".pack-") as spool:
        size, digest, files = pack(start.view.path, seen, spool.fileno())
        if start.given_up:
            return None
        number = _send(start, spool.fileno(), size, digest, files)
    start.saved = seen
    return f"startup cache {number} saved: {number_of(files, 'file')}, {human_bytes(size)}"


def _send(start: Start, spool: int, size: int, digest: str, files: int) -> int:
    assert start.view is not None
    wire = Wire(start.socket, patience=5.0)
    try:
        wire.send(
            "startup-save",
            pipeline=start.pipeline,
            key=start.key,
            generation=start.generation,
            size=size,
            digest=digest,
            files=files,
            view=start.view.path,
            layouts=sorted(start.layouts),
        )
        while (message := wire.receive()).get("type") == "progress":  # others save before
            pass
        if message.get("type") != "handed" or not wire.descriptors:
            raise ControlProtocolError("the daemon took no startup cache; use the same release of both")
        pipe = wire.descriptors.pop()
        try:
            at = 0
            while at < size and (data := os.pread(spool, min(BLOCK, size - at), at)):
                view = memoryview(data)
                at += len(view)
                while view:
                    view = view[os.write(pipe, view) :]
        except BrokenPipeError:
            pass  # why, comes next
        finally:
            os.close(pipe)
        while (message := wire.receive()).get("type") != "done":
            pass
        result = message.get("result")
        if not isinstance(result, dict):
            raise InstantStartError("the daemon did not say what it kept")
        return int(result["number"])
    finally:
        wire.close()
