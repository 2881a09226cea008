"""The store's directory tree: descriptor-relative walks, durable writes, and deletions that a crash cannot leave half
done.

It knows names and directories, but neither manifests nor presence. It never follows a symbolic link below the root.

What a crash can leave, at any system call:
- writes: a file in trash/ (written and fsynced there, then renamed into place), which the next open removes;
- deletions: a tree in trash/ (renamed there whole, then removed), which the next open removes;
- directories: an entry that is not durable yet, made durable by the next process that walks over it, before anything
  that relies on it is.
"""

from __future__ import annotations

import contextlib
import errno
import itertools
import os
import shutil
import stat
import threading
import time
from collections.abc import Sequence

from instantstart_fs.errors import NoSuchEntry, StoreDamaged, StoreLost
from instantstart_fs.store.layout import DIRECTORY_MODE, FILE_MODE, SLOTS
from instantstart_fs.store.os_errors import translated

DIRECTORY_FLAGS = os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC
REMOVED = "its directory was removed under the daemon; restart the daemon, which makes it anew, then `update` or `add`"


class StoreTree:
    """The directories slots/ and trash/ of a store. ``slots_fd``, ``trash_fd``: descriptors that the tree owns from now
    on. ``trash``: path of the trash, for messages. Thread-safe, except that nobody may delete a generation that another
    thread uses."""

    def __init__(self, slots_fd: int, trash_fd: int, trash: str) -> None:
        self.slots_fd = slots_fd
        self.trash_fd = trash_fd
        self._trash = trash
        self._unique = itertools.count()
        self._mutex = threading.Lock()
        self._deleting: dict[str, tuple[str, ...]] = {}
        """The entries that are being removed from the trash: name there → components below slots/ before."""
        self._durable: set[tuple[str, ...]] = set()
        """Directories (components below slots/) whose entries this process has made durable."""

    def close(self) -> None:
        """Close both descriptors. Idempotent."""
        for name in ("trash_fd", "slots_fd"):
            fd = getattr(self, name)
            if fd >= 0:
                setattr(self, name, -1)
                os.close(fd)

    def removed(self) -> bool:
        """Whether slots/ was removed under the daemon: nothing can be written until the next start makes it again."""
        try:
            return os.fstat(self.slots_fd).st_nlink == 0
        except OSError:
            return False

    def list_directory(self, *components: str) -> list[str]:
        """The names in slots/``components``, sorted; none if it is not there or no directory. Raises StoreError: a
        directory that cannot be read now is not empty."""
        try:
            with translated(f"list {shown(components)}"):
                fd = self.walk(components)
                try:
                    return sorted(os.listdir(fd))
                finally:
                    os.close(fd)
        except (NoSuchEntry, StoreLost):
            return []

    def walk(self, components: Sequence[str], *, create: bool = False, root: int | None = None) -> int:
        """Open the directory slots/``components``; no component may be a symbolic link (ENOTDIR).

        Args:
            components: Names, from slots/ down.
            create: Make what is missing, and each entry durable in its parent, once per process.
            root: A descriptor to start from in the place of slots/.

        Returns:
            A descriptor, which the caller closes.

        Raises:
            NoSuchEntry: It is not there (without ``create``).
            OSError: Any other failure.
        """
        fd = os.dup(self.slots_fd if root is None else root)
        try:
            for depth, name in enumerate(components, 1):
                if create and (walked := tuple(components[:depth])) not in self._durable:
                    with contextlib.suppress(FileExistsError):
                        os.mkdir(name, DIRECTORY_MODE, dir_fd=fd)
                    os.fsync(fd)
                    with self._mutex:
                        self._durable.add(walked)
                try:
                    below = os.open(name, DIRECTORY_FLAGS, dir_fd=fd)
                except FileNotFoundError:
                    if not create:
                        raise
                    self._make_again(tuple(components[:depth]), fd)
                    below = os.open(name, DIRECTORY_FLAGS, dir_fd=fd)
                os.close(fd)
                fd = below
        except FileNotFoundError as error:
            os.close(fd)
            why = f": {REMOVED}" if self.removed() else ""
            raise NoSuchEntry(f"{shown(components)} is not in the store{why}") from error
        except BaseException:
            os.close(fd)
            raise
        return fd

    def _make_again(self, components: tuple[str, ...], parent: int) -> None:
        """Make a directory again that was removed under the daemon. Raises OSError."""
        with contextlib.suppress(FileExistsError):
            os.mkdir(components[-1], DIRECTORY_MODE, dir_fd=parent)
        os.fsync(parent)
        with self._mutex:
            length = len(components)
            self._durable = {known for known in self._durable if known[:length] != components}
            self._durable.add(components)

    def unique_name(self) -> str:
        """A name that no entry of the trash has or had."""
        return f"{time.time_ns()}-{os.getpid()}-{next(self._unique)}"

    # -- files -----------------------------------------------------------------------------------------------------

    def write(self, directory: tuple[str, ...], name: str, data: bytes) -> None:
        """Write a small file atomically and durably. Raises StoreError."""
        temporary = self.unique_name()
        with translated(f"write {shown((*directory, name))}"):
            parent = self.walk(directory, create=True)
            try:
                flags = os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW | os.O_CLOEXEC
                with open(os.open(temporary, flags, FILE_MODE, dir_fd=self.trash_fd), "wb") as file:
                    file.write(data)
                    file.flush()
                    os.fsync(file.fileno())
                os.rename(temporary, name, src_dir_fd=self.trash_fd, dst_dir_fd=parent)
                os.fsync(parent)
            except BaseException:
                with contextlib.suppress(OSError):
                    os.unlink(temporary, dir_fd=self.trash_fd)
                raise
            finally:
                os.close(parent)

    def read(self, directory: tuple[str, ...], name: str) -> bytes:
        """Read a small file. Raises NoSuchEntry, StoreDamaged, StoreError."""
        where = shown((*directory, name))
        try:
            return self._read_once(directory, name, where)
        except StoreDamaged as error:
            if not isinstance(error.__cause__, OSError) or error.__cause__.errno != errno.EIO:
                raise
        return self._read_once(directory, name, where)  # a transient I/O error is reported once

    def _read_once(self, directory: tuple[str, ...], name: str, where: str) -> bytes:
        with translated(f"read {where}"):
            parent = self.walk(directory)
            try:
                fd = os.open(name, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC, dir_fd=parent)
            except FileNotFoundError as error:
                raise NoSuchEntry(f"{where} is not in the store") from error
            finally:
                os.close(parent)
            with open(fd, "rb") as file:
                check_own(os.fstat(fd), where)
                return file.read()

    def is_file(self, directory: tuple[str, ...], name: str) -> bool:
        """Whether a regular file is there. Raises StoreError."""
        with translated(f"look at {shown((*directory, name))}"):
            try:
                parent = self.walk(directory)
            except (NoSuchEntry, NotADirectoryError):
                return False
            try:
                return stat.S_ISREG(os.stat(name, dir_fd=parent, follow_symlinks=False).st_mode)
            except FileNotFoundError:
                return False
            finally:
                os.close(parent)

    # -- deletion --------------------------------------------------------------------------------------------------

    def delete(self, components: Sequence[str]) -> None:
        """Remove whatever is at slots/``components``: renamed into the trash durably, then removed. No effect if it is
        not there. Raises StoreError."""
        components = tuple(components)
        trashed = self.unique_name()
        with translated(f"delete {shown(components)}"):
            try:
                parent = self.walk(components[:-1])
            except NoSuchEntry:
                return
            with self._mutex:
                self._deleting[trashed] = components
            try:
                try:
                    os.rename(components[-1], trashed, src_dir_fd=parent, dst_dir_fd=self.trash_fd)
                    os.fsync(parent)
                    os.fsync(self.trash_fd)
                except FileNotFoundError:
                    return
                finally:
                    os.close(parent)
                with self._mutex:
                    length = len(components)
                    self._durable = {known for known in self._durable if known[:length] != components}
                self._remove_trashed(trashed)
            finally:
                with self._mutex:
                    del self._deleting[trashed]

    def empty_trash(self) -> None:
        """Remove what an earlier process left in the trash. Raises StoreError."""
        with translated(f"empty {self._trash}"):
            for name in os.listdir(self.trash_fd):
                self._remove_trashed(name)

    def _remove_trashed(self, name: str) -> None:
        try:
            os.unlink(name, dir_fd=self.trash_fd)
        except IsADirectoryError:
            shutil.rmtree(name, dir_fd=self.trash_fd)

    def _is_obstacle(self, components: tuple[str, ...]) -> bool:
        """Whether something other than a directory is there. Raises OSError."""
        try:
            parent = self.walk(components[:-1])
        except NoSuchEntry:
            return False
        try:
            return not stat.S_ISDIR(os.stat(components[-1], dir_fd=parent, follow_symlinks=False).st_mode)
        except FileNotFoundError:
            return False
        finally:
            os.close(parent)

    def delete_obstacle(self, directory: tuple[str, ...]) -> bool:
        """Delete the first component on the way to ``directory`` that is no directory; whether there was one.

        Raises:
            StoreError: It cannot be deleted (a mount point, say).
        """
        for depth in range(1, len(directory) + 1):
            if self._is_obstacle(directory[:depth]):
                self.delete(directory[:depth])
                return True
        return False

    def being_deleted(self) -> list[tuple[str, tuple[str, ...]]]:
        """Entries being removed from the trash: (name there, components below slots/)."""
        with self._mutex:
            return list(self._deleting.items())


def shown(components: Sequence[str]) -> str:
    """A path below the root, as messages show it."""
    return "/".join((SLOTS, *components))


def check_own(status: os.stat_result, where: str, names: int = 1) -> None:
    """Refuse what the daemon did not make: no regular file, or one with more than ``names`` names. Raises StoreLost."""
    if not stat.S_ISREG(status.st_mode):
        raise StoreLost(f"{where} is not a regular file: the daemon did not put it there")
    if status.st_nlink > names:
        raise StoreLost(f"{where} has {status.st_nlink} names: somebody linked a file into or out of the store")
    if status.st_nlink == 0:
        raise FileNotFoundError(errno.ENOENT, os.strerror(errno.ENOENT), where)
