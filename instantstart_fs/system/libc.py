"""The C library, for calls that Python does not offer, and its errors as OSError. The calls are where they are used."""

from __future__ import annotations

import ctypes
import os
from typing import Final

LIBC: Final = ctypes.CDLL(None, use_errno=True)


def checked(result: int, path: str | None = None) -> int:
    """``result`` of a call of LIBC that was made just now in this thread. Raises OSError for a negative one."""
    if result < 0:
        raise last_error(path)
    return result


def last_error(path: str | None = None) -> OSError:
    """Return the OSError of the last call of LIBC in this thread."""
    number = ctypes.get_errno()
    return OSError(number, os.strerror(number), path) if path is not None else OSError(number, os.strerror(number))
