"""Checks complete files that generations of one pipeline share: one file on disk with a hard link in each, and none
elsewhere. A shared file is never opened for filling.
"""

from __future__ import annotations

import contextlib
import os

from instantstart_fs.core.names import validate_origin_path, validate_pipeline_id
from instantstart_fs.errors import NoSuchEntry
from instantstart_fs.store.layout import FILES, generation_number
from instantstart_fs.store.os_errors import translated
from instantstart_fs.store.tree import StoreTree, check_own


def blob_place(pipeline: str, generation: int, path: str) -> tuple[tuple[str, ...], str]:
    """Return (directory below slots/, name) of a file of a generation. Raises if a name is not valid."""
    validate_pipeline_id(pipeline)
    *directories, name = validate_origin_path(path).split("/")
    return (pipeline, str(generation), FILES, *directories), name


def stat_blob(tree: StoreTree, pipeline: str, generation: int, path: str) -> tuple[int, int] | None:
    """Return (device, inode) of the entry; None if there is none. Raises StoreError if it cannot be looked up: a
    shortage of descriptors must not make a shared file look like a stranger's link."""
    directory, name = blob_place(pipeline, generation, path)
    with translated(f"look at {pipeline}/{generation}/{path}"):
        try:
            parent = tree.walk(directory)
        except (NoSuchEntry, NotADirectoryError):
            return None
        try:
            status = os.stat(name, dir_fd=parent, follow_symlinks=False)
        except FileNotFoundError:
            return None
        finally:
            os.close(parent)
    return status.st_dev, status.st_ino


def check_shared(tree: StoreTree, fd: int, pipeline: str, path: str, where: str) -> os.stat_result:
    """Check as ``check_own`` does, but accept names of the file in other generations of the pipeline, also while those
    are being deleted."""
    status = os.fstat(fd)
    while True:
        own = _own_names(tree, status, pipeline, path) if status.st_nlink > 1 else 1
        again = os.fstat(fd)
        if own >= status.st_nlink or again.st_nlink >= status.st_nlink:
            check_own(status, where, own)
            return status
        status = again  # a name was deleted while we counted


def _own_names(tree: StoreTree, status: os.stat_result, pipeline: str, path: str) -> int:
    inode = status.st_dev, status.st_ino
    numbers = [number for name in tree.list_directory(pipeline) if (number := generation_number(name)) is not None]
    count = sum(stat_blob(tree, pipeline, number, path) == inode for number in numbers)
    # After the slots: a name that moves to the trash in between is counted twice, but never missed.
    for name, components in tree.being_deleted():
        if components[0] == pipeline and len(components) >= 2:
            below = "/".join([name, *((FILES,) if len(components) == 2 else ()), path])
            with contextlib.suppress(OSError):
                found = os.stat(below, dir_fd=tree.trash_fd, follow_symlinks=False)
                count += (found.st_dev, found.st_ino) == inode
    return count
