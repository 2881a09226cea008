"""Names the processes that have a pipeline's files open, or hold a lease of it, for the message of a refusal."""

from __future__ import annotations

import contextlib
import os

import trio

from instantstart_fs.catalog.model import Generation, Pipeline
from instantstart_fs.errors import InstantStartError
from instantstart_fs.ipc.threads import run_abandonable
from instantstart_fs.serving.open_by import UsingProcess, known, listed, processes_using
from instantstart_fs.store.blobstore import BlobStore

PROC_SCAN_DEADLINE = 5.0
"""Seconds for a look through /proc: a busy host's takes one."""

MOST_HELD = 2000
"""Files whose inode numbers in the store are looked up for it."""


class Users:
    """Looks through /proc for processes, one look at a time."""

    def __init__(self, store: BlobStore) -> None:
        self._store = store
        self._looking = trio.CapacityLimiter(1)

    async def processes_using(self, pipeline: Pipeline) -> list[UsingProcess]:
        """Return the processes that have files of it open or mapped, handed-over ones too; none after
        PROC_SCAN_DEADLINE."""
        generations = [found for found in pipeline.heads() if isinstance(found, Generation)]
        if not any(generation.handles for generation in generations) and not pipeline.leases:
            return []
        files = [file for generation in generations for file in generation.files if file.handles or file.complete]
        inodes: dict[str, set[int]] = {}
        for file in files:
            inodes.setdefault(file.entry.path.rpartition("/")[2], set()).add(file.nodeid)
        held = [(file.triple, file.entry.path) for file in files if file.complete][:MOST_HELD]

        def look() -> list[UsingProcess]:
            # Whom a file was handed, or who has it bound over the mount, has the store's own open.
            for (name, generation, _), path in held:
                with contextlib.suppress(InstantStartError):
                    blob = self._store.existing_blob(name, generation, path)
                    if blob is not None:
                        with blob:
                            inodes[path.rpartition("/")[2]].add(os.fstat(blob.fd).st_ino)
            return processes_using(inodes)

        with trio.move_on_after(PROC_SCAN_DEADLINE):
            return await run_abandonable(look, limiter=self._looking)
        return []


def leased(pipeline: Pipeline) -> str:
    """``2 lease(s) hold it: pid 7 (vllm, uid 1000), …``"""
    processes = [known(lessee.pid, lessee.uid) for lessee in pipeline.lessees]
    return f"{pipeline.leases} lease(s) hold it" + (f": {listed(processes)}" if processes else "")
