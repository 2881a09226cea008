"""Where an engine keeps what it compiles while it runs: a private directory, made anew for each start.

    <base>/<pipeline>/<n>/            n: the lowest that nobody uses, so that a lone replica always has the same path
    <base>/<pipeline>/<n>.lock        held (flock) by `run` and by the command: one whose `run` was killed keeps it
    <base>/<pipeline>/<n>.links       symbolic links that lead into it from elsewhere (`--cache /ABSOLUTE`): they go
                                      with it, or before the next one is made there

What is compiled may have its own path in it, so the path is the same from start to start. What an earlier start left
there is removed first: what is not in the store was not kept.
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import os
import stat
import time
from collections.abc import Iterator

MAX_VIEWS = 64
"""Starts of one pipeline on one machine at the same time."""


class NoView(Exception):
    """There is none: the engine runs with its own directories."""


def base_directory() -> str:
    """$INSTANTSTART_STARTUP_DIR, else systemd's CacheDirectory=, else the user's cache, else one of the user's in
    /var/tmp."""
    for given in (os.environ.get("INSTANTSTART_STARTUP_DIR"), os.environ.get("CACHE_DIRECTORY", "").split(":")[0]):
        if given and os.path.isabs(given):
            return given
    cache = os.environ.get("XDG_CACHE_HOME", "")
    if not os.path.isabs(cache):
        cache = os.path.join(os.path.expanduser("~"), ".cache")
    home = os.path.dirname(cache)
    if os.path.isabs(cache) and os.access(cache if os.path.isdir(cache) else home, os.W_OK):
        return os.path.join(cache, "instantstart", "startup")
    return f"/var/tmp/instantstart-startup-{os.geteuid()}"


LINKING_SECONDS = 1.0
"""Seconds to wait for another start that makes its links."""


class View:
    """A private directory. ``descriptor``: its lock, which the command inherits."""

    def __init__(self, path: str, descriptor: int) -> None:
        self.path = path
        self.descriptor = descriptor

    def remove(self) -> None:
        """Remove the directory when the command has ended. The lock goes with the last process that has it."""
        import shutil

        with contextlib.suppress(OSError):
            self.unlink()
        shutil.rmtree(self.path, ignore_errors=True)

    def link(self, place: str, name: str) -> None:
        """Make ``place``, an absolute path, a symbolic link to ``name`` in it. Raises OSError where something is there
        that is not the link of a start that has ended."""
        base = os.path.dirname(os.path.dirname(self.path))
        with _linking(base):
            if not os.path.basename(place):
                raise IsADirectoryError(errno.EISDIR, "name it without a slash at its end")
            try:
                found = os.readlink(place)
            except FileNotFoundError:
                os.makedirs(os.path.dirname(place), exist_ok=True)
            except OSError as error:
                if error.errno != errno.EINVAL:
                    raise
                raise FileExistsError(errno.EEXIST, "something else is there") from error
            else:
                _check_left(base, found)
                os.unlink(place)
            with open(f"{self.path}.links", "ab") as file:  # first: what is not in it stays when we are killed
                file.write(os.fsencode(place) + b"\0")
            os.symlink(os.path.join(self.path, name), place)

    def unlink(self) -> None:
        """Remove the links that lead into it. Raises OSError."""
        known = f"{self.path}.links"
        try:
            with open(known, "rb") as file:
                places = file.read().split(b"\0")
        except FileNotFoundError:
            return
        for place in filter(None, places):
            with contextlib.suppress(OSError):
                if os.readlink(place).startswith(os.fsencode(self.path) + b"/"):
                    os.unlink(place)
        os.unlink(known)

    def empty(self) -> None:
        """Make the directory, empty, whatever an earlier start left there. Links that lead into it stay: they lead to
        what is made there next. Raises OSError."""
        try:
            os.mkdir(self.path, 0o700)
        except FileExistsError:  # an earlier start was killed; shutil takes 4 ms to import
            import shutil

            shutil.rmtree(self.path)
            os.mkdir(self.path, 0o700)


def take_view(pipeline: str, base: str) -> View:
    """Take a directory. Raises NoView if there is no place that is this user's alone."""
    if "/" in pipeline or pipeline.startswith("."):
        raise NoView(f"{pipeline!r} is no pipeline's id")
    try:
        os.makedirs(base, 0o700, exist_ok=True)
        directory = os.path.join(base, pipeline)
        os.makedirs(directory, 0o700, exist_ok=True)
        for path in (base, directory):
            found = os.lstat(path)
            if not stat.S_ISDIR(found.st_mode) or found.st_uid != os.geteuid() or found.st_mode & 0o022:
                raise NoView(f"{path} is not this user's alone (chmod go-w, or name another with --cache-dir)")
        if os.statvfs(directory).f_flag & os.ST_NOEXEC:  # an engine could not load what it compiles there
            raise NoView(f"{directory} is mounted noexec; name another with --cache-dir")
        for number in range(MAX_VIEWS):
            path = os.path.join(directory, str(number))
            lock = os.open(f"{path}.lock", os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW | os.O_CLOEXEC, 0o600)
            try:
                fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                os.close(lock)
                continue
            view = View(path, lock)
            try:
                view.unlink()
                view.empty()
            except OSError:
                os.close(lock)
                raise
            os.set_inheritable(lock, True)
            return view
    except OSError as error:
        raise NoView(f"{base}: {error.strerror or error}") from error
    raise NoView(f"{directory}: {MAX_VIEWS} starts use their directories already")


def sweep(view: View) -> None:
    """Remove what starts of the same pipeline that were killed have left: a lone start never takes their numbers.
    Raises OSError."""
    directory = os.path.dirname(view.path)
    for name in os.listdir(directory):
        path = os.path.join(directory, name.removesuffix(".lock"))
        if not (name.endswith(".lock") and name[:-5].isdecimal()) or path == view.path or not os.path.isdir(path):
            continue
        try:
            lock = os.open(f"{path}.lock", os.O_RDWR | os.O_NOFOLLOW | os.O_CLOEXEC)
        except OSError:
            continue
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            View(path, lock).remove()
        except BlockingIOError:
            continue
        finally:
            os.close(lock)


def _check_left(base: str, found: str) -> None:
    """Check that a link to ``found`` was left by a start that has ended. Raises OSError."""
    below = os.path.relpath(found, base).split("/")  # <pipeline>/<n>/<name>
    if len(below) != 3 or below[0] == ".." or not below[1].isdecimal():
        raise FileExistsError(errno.EEXIST, "it is a link to somewhere else")
    try:
        lock = os.open(os.path.join(base, *below[:1], f"{below[1]}.lock"), os.O_RDWR | os.O_NOFOLLOW | os.O_CLOEXEC)
    except FileNotFoundError:
        return
    try:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError as error:
        raise FileExistsError(errno.EEXIST, "another start, which still runs, has it") from error
    finally:
        os.close(lock)


@contextlib.contextmanager
def _linking(base: str) -> Iterator[None]:
    """Let one start of this user at a time make links. Raises OSError."""
    lock = os.open(base, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        end = time.monotonic() + LINKING_SECONDS
        while True:
            try:
                fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
                break
            except BlockingIOError:
                if time.monotonic() > end:
                    raise
                time.sleep(0.01)
        yield
    finally:
        os.close(lock)
