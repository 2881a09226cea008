"""Regular expressions that are compiled when they are first used: the daemon's start does not wait for them. Pure."""

from __future__ import annotations

import re
from typing import Any, AnyStr, Generic, cast


class _LatePattern(Generic[AnyStr]):
    """Stands for a ``re.Pattern``, and takes its attributes over one by one as they are asked for."""

    def __init__(self, pattern: AnyStr, flags: int) -> None:
        self._arguments: tuple[AnyStr, int] = (pattern, flags)

    def __getattr__(self, name: str) -> Any:
        value = getattr(re.compile(*self._arguments), name)  # re keeps what it has compiled
        setattr(self, name, value)
        return value


def late(pattern: AnyStr, flags: int = 0) -> re.Pattern[AnyStr]:
    """Return a pattern that is compiled at its first use. An error in it shows only then: tests use each of them.

    Compiling those of core/ (twins, pasted, roles, source) takes some 10 ms of a start of 250 ms.
    """
    return cast("re.Pattern[AnyStr]", _LatePattern(pattern, flags))
