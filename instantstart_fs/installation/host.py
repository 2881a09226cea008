"""Changes a machine, or a directory that stands for one, step by step; says each step that changes something.

Every step may be repeated: what is as it should be is left alone. Foreign errors are translated here.
"""

from __future__ import annotations

import contextlib
import os
import shutil
import stat
import subprocess
from collections.abc import Callable

from instantstart_fs.errors import InstantStartError, PermissionRefused, printable

DEADLINE = 240.0
"""Seconds for one program: a stop takes 30, a start 120 (the unit's limits)."""


class Host:
    """The machine that is changed. ``root``: what all paths lie below ("" is the machine). ``dry``: steps are printed
    and not done."""

    def __init__(self, say: Callable[[str], None], *, root: str = "", dry: bool = False) -> None:
        self.root = root.rstrip("/")
        self.dry = dry
        self._say = say

    def place(self, path: str) -> str:
        """Return where ``path`` of the machine lies."""
        return self.root + path

    def read(self, path: str) -> str | None:
        """Return the file's text; None if there is no file."""
        try:
            with open(self.place(path), encoding="utf-8", errors="surrogateescape") as file:
                return file.read()
        except FileNotFoundError:
            return None
        except OSError as error:
            raise _failed("read", path, error) from error

    def directory(self, path: str) -> None:
        """0755, with its parents."""
        if os.path.isdir(self.place(path)):
            return
        self._say(f"mkdir   {path}")
        if not self.dry:
            try:
                os.makedirs(self.place(path), 0o755, exist_ok=True)
                os.chmod(self.place(path), 0o755)
            except OSError as error:
                raise _failed("make", path, error) from error

    def put(self, path: str, text: str, mode: int = 0o644) -> None:
        """The whole file or, whatever happens, the one that was there."""
        place = self.place(path)
        with contextlib.suppress(OSError):
            if self.read(path) == text and stat.S_IMODE(os.lstat(place).st_mode) == mode:
                return
        self.directory(os.path.dirname(path))
        self._say(f"write   {path}")
        if self.dry:
            return
        beside = f"{place}.instantstart-new"
        try:
            with open(beside, "w", encoding="utf-8", errors="surrogateescape") as file:
                file.write(text)
                os.fchmod(file.fileno(), mode)
                os.fsync(file.fileno())
            os.replace(beside, place)
        except OSError as error:
            with contextlib.suppress(OSError):
                os.unlink(beside)
            raise _failed("write", path, error) from error

    def edit(self, path: str, change: Callable[[str], str]) -> None:
        """Edit another program's file, if there is one."""
        text = self.read(path)
        if text is not None and (changed := change(text)) != text:
            self.put(path, changed, stat.S_IMODE(os.stat(self.place(path)).st_mode))

    def link(self, path: str, target: str) -> None:
        """A symbolic link; what is no link stays."""
        place = self.place(path)
        if os.path.lexists(place) and (not os.path.islink(place) or os.readlink(place) == target):
            return
        self.directory(os.path.dirname(path))
        self._say(f"link    {path} -> {target}")
        if self.dry:
            return
        beside = f"{place}.instantstart-new"
        try:
            with contextlib.suppress(FileNotFoundError):
                os.unlink(beside)
            os.symlink(target, beside)
            os.replace(beside, place)
        except OSError as error:
            raise _failed("write", path, error) from error

    def remove(self, path: str) -> None:
        """A file or a link."""
        if not os.path.lexists(self.place(path)):
            return
        self._say(f"remove  {path}")
        if not self.dry:
            try:
                os.unlink(self.place(path))
            except OSError as error:
                raise _failed("remove", path, error) from error

    def remove_empty(self, path: str) -> None:
        """A directory that holds nothing and that nothing is mounted on; others stay."""
        place = self.place(path)
        try:
            if os.path.ismount(place) or os.listdir(place):
                return
        except OSError:
            return
        self._say(f"rmdir   {path}")
        if not self.dry:
            with contextlib.suppress(OSError):
                os.rmdir(place)

    def remove_tree(self, path: str) -> None:
        """A directory and all below it. A mountpoint is emptied and stays."""
        place = self.place(path)
        if not os.path.isdir(place) or os.path.islink(place):
            return
        self._say(f"remove  {path} and everything below it")
        if self.dry:
            return
        try:
            for entry in os.scandir(place):
                if entry.is_dir(follow_symlinks=False):
                    shutil.rmtree(entry.path)
                else:
                    os.unlink(entry.path)
            if not os.path.ismount(place):
                os.rmdir(place)
        except OSError as error:
            raise _failed("remove", path, error) from error

    def run(self, *command: str, check: bool = True) -> None:
        """A program of the machine. Raises InstantStartError with what it said when it fails and ``check``."""
        self._say(f"run     {' '.join(command)}")
        if self.dry:
            return
        status, said = ask(*command)
        if status != 0 and check:
            raise InstantStartError(f"`{' '.join(command)}` failed: {said or f'exit status {status}'}")


def ask(*command: str) -> tuple[int, str]:
    """Exit status and what it said, as one line. Raises InstantStartError where it cannot be run."""
    try:
        done = subprocess.run(
            command, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, timeout=DEADLINE,
            env={**os.environ, "LC_ALL": "C.UTF-8", "SYSTEMD_COLORS": "0", "SYSTEMD_PAGER": ""}, check=False,
        )  # fmt: skip
    except FileNotFoundError as error:
        raise InstantStartError(f"`{command[0]}` is not installed here") from error
    except subprocess.TimeoutExpired as error:
        raise InstantStartError(f"`{' '.join(command)}` took longer than {DEADLINE:g} s") from error
    except OSError as error:
        raise InstantStartError(f"`{command[0]}` cannot be run: {error.strerror}") from error
    text = done.stdout.decode(errors="replace")
    return done.returncode, printable(" ".join(line.strip() for line in text.splitlines() if line.strip()))


def _failed(what: str, path: str, error: OSError) -> InstantStartError:
    kind = PermissionRefused if isinstance(error, PermissionError) else InstantStartError
    return kind(f"cannot {what} {path}: {error.strerror}")
