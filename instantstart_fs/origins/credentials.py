"""Reads credential files, but only if nobody except their owner could have read or written them."""

from __future__ import annotations

import logging
import os
import stat

from instantstart_fs.errors import CredentialsUnusable

log = logging.getLogger(__name__)

MAX_SECRET = 4096
"""The most bytes of a token file that are read."""

_warned: set[str] = set()


def require_private(path: str, status: os.stat_result, what: str) -> None:
    """Check that a file is private. Raises CredentialsUnusable if others may read or write it, or its group may write
    it; a group that may read it is warned about once. ``what``: "token file", say."""
    mode = stat.S_IMODE(status.st_mode)
    if mode & 0o026:
        raise CredentialsUnusable(
            f"the {what} {path} has mode {mode:04o}: others could read or change it; `chmod 600 {path}`, and replace "
            "the secret if somebody may have seen it"
        )
    if mode & 0o040 and path not in _warned:
        _warned.add(path)
        log.warning(
            "the %s %s may be read by its group (mode %04o); `chmod 600` it unless that is meant", what, path, mode
        )


def read_token(path: str) -> str:
    """The one token that the file holds. Raises CredentialsUnusable; its messages hold nothing of the content."""
    try:
        # O_NONBLOCK: a FIFO must not keep a thread waiting.
        descriptor = os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC)
        try:
            status = os.fstat(descriptor)
            if not stat.S_ISREG(status.st_mode):
                raise CredentialsUnusable(f"the token file {path} is not a regular file")
            require_private(path, status, "token file")
            raw = os.read(descriptor, MAX_SECRET).strip()
        finally:
            os.close(descriptor)
    except OSError as error:
        raise CredentialsUnusable(
            f"the token file {path} cannot be read ({os.strerror(error.errno or 0)}); "
            "give the daemon permission, or name another with --token-file"
        ) from None
    # Printable ASCII: an HTTP client that meets anything else in a header quotes it in its error.
    if not raw or not all(0x21 <= byte <= 0x7E for byte in raw):
        raise CredentialsUnusable(f"the token file {path} does not hold one token")
    return raw.decode("ascii")
