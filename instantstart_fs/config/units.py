"""Parses sizes, durations, modes and owners as people write them. Pure, except for looking up users. Raises
ConfigError.
"""

from __future__ import annotations

from collections.abc import Callable
from datetime import datetime
from typing import TypeVar

from instantstart_fs.config.sections import Capacity
from instantstart_fs.core.late_pattern import late
from instantstart_fs.core.limits import MAX_BYTES, MAX_DIGITS, MAX_ID, MAX_SECONDS, MAX_TIME_NS, MIN_RATE
from instantstart_fs.errors import ConfigError, UsageError

_T = TypeVar("_T")
_A = TypeVar("_A")
LOOKUP_SECONDS = 10.0
_UNITS = {"": 1, "B": 1, "K": 1024, "M": 1024**2, "G": 1024**3, "T": 1024**4, "P": 1024**5} | {
    f"{letter}{suffix}": base**power
    for power, letter in enumerate("KMGTP", 1)
    for suffix, base in (("B", 1000), ("iB", 1024))
}
_NUMBER = rf"[0-9]{{1,{MAX_DIGITS}}}(?:\.[0-9]{{1,{MAX_DIGITS}}})?"
_SIZE = late(rf"({_NUMBER})\s*([A-Za-z]*)\Z")
_SHARE = late(rf"({_NUMBER})\s*%\Z")
_DURATION = late(rf"({_NUMBER})\s*(ms|s|m|h|d)\Z")
_SECONDS = {"ms": 0.001, "s": 1.0, "m": 60.0, "h": 3600.0, "d": 86400.0}


def parse_size(value: str | int) -> int:
    """Return bytes from 8388608, "8MiB" (1024s), "8MB" (1000s) or "8M" (1024s, as in GNU tools). Raises ConfigError."""
    if isinstance(value, int) and not isinstance(value, bool):
        size = value
    else:
        match = _SIZE.match(value.strip()) if isinstance(value, str) else None
        if match is None or match[2] not in _UNITS:
            raise ConfigError(f'{_brief(value)} is not a size such as "8MiB" or "500GB"')
        size = int(float(match[1]) * _UNITS[match[2]]) if "." in match[1] else int(match[1]) * _UNITS[match[2]]
    if not 0 <= size <= MAX_BYTES:
        raise ConfigError(f"{_brief(value)} is not a size: it has to be from 0 to 8 EiB")
    return size


def parse_rate(value: str | int) -> int:
    """Return bytes a second from a size. Raises ConfigError, also for a rate so small that nothing would ever end."""
    rate = parse_size(value)
    if rate < MIN_RATE:
        raise ConfigError(f"{_brief(value)} is less than 1MB a second: a terabyte would take weeks")
    return rate


def parse_capacity(value: str | int) -> Capacity:
    """A size, or a share such as "80%". Raises ConfigError."""
    if isinstance(value, str) and value.strip().endswith("%"):
        match = _SHARE.match(value.strip())
        percent = float(match[1]) if match is not None else 0.0
        if not 0 < percent <= 100:
            raise ConfigError(f"{_brief(value)} is not a share between 0% and 100%")
        return Capacity(fraction=percent / 100)
    try:
        size = parse_size(value)
    except ConfigError:
        raise ConfigError(f'{_brief(value)} is neither a size such as "500GiB" nor a share such as "80%"') from None
    if size == 0:
        raise ConfigError("must be more than 0")
    return Capacity(bytes=size)


def parse_floor(value: str | int) -> Capacity:
    """Like ``parse_capacity``; 0 and "0%" are none. Raises ConfigError."""
    if value == 0 or (isinstance(value, str) and value.strip() in ("0", "0%")):
        return Capacity(bytes=0)
    return parse_capacity(value)


def parse_duration(value: str | float) -> float:
    """Seconds from 60, "60s", "500ms", "15m", "48h" or "7d". Raises ConfigError."""
    if isinstance(value, int | float) and not isinstance(value, bool):
        seconds = value
    else:
        match = _DURATION.match(value.strip()) if isinstance(value, str) else None
        if match is None:
            raise ConfigError(f'{_brief(value)} is not a duration such as "60s", "15m", "48h" or "7d"')
        seconds = float(match[1]) * _SECONDS[match[2]]
    if not 0 <= seconds < MAX_SECONDS:  # a nan is neither
        raise ConfigError(f"{_brief(value)} is not a duration: it has to be from 0 to 300 years")
    return float(seconds)


def parse_interval(value: str | float) -> float | None:
    """Return seconds: None from "off", else a duration of a second at least. Raises ConfigError."""
    if value == "off":
        return None
    try:
        seconds = parse_duration(value)
    except ConfigError:
        raise ConfigError(f'{_brief(value)} is neither "off" nor a duration such as "24h" or "30d"') from None
    if seconds < 1:
        raise ConfigError(f'{value!r} is less than a second; "off" is never')
    return seconds


def parse_mode(value: str | int) -> int:
    """Permission bits of a pipeline's directories from "0555" or 0o555; write bits are refused. Raises ConfigError."""
    try:
        mode = int(value, 8) if isinstance(value, str) else value
    except ValueError:
        mode = -1
    if not 0 <= mode <= 0o777:
        raise ConfigError(f'{value!r} is not a mode such as "0555"')
    if mode & 0o222:
        raise ConfigError(f"mode {mode:04o} holds write bits; the mount is read-only: use 0555, 0550 or 0500")
    return mode


def parse_owner(value: str) -> tuple[int, int]:
    """Return (uid, gid) from "1000:1000", "alice:ml" or "alice" (her own group). Raises ConfigError."""
    import grp
    import pwd

    user, colon, group = value.partition(":")
    if not user or (colon and not group):
        raise ConfigError(f"{value!r} is not UID:GID")
    try:
        if user.isdecimal():
            uid = _number(user)
            gid = uid if colon else _group_of(uid)
        else:
            entry = _looked_up(pwd.getpwnam, user)
            uid, gid = entry.pw_uid, entry.pw_gid
        if group:
            gid = _number(group) if group.isdecimal() else _looked_up(grp.getgrnam, group).gr_gid
    except KeyError:
        raise ConfigError(f"{value!r} names a user or group that this machine does not know") from None
    if uid > MAX_ID or gid > MAX_ID:
        raise ConfigError(f"{_brief(value)} is out of range")
    return uid, gid


def primary_group(uid: int) -> int:
    """Return the group of a user, which is the uid for one that nobody knows. Raises ConfigError where the machine's
    user database does not answer."""
    import pwd

    try:
        return _looked_up(pwd.getpwuid, uid).pw_gid
    except KeyError:
        return uid


def parse_group(value: str | int) -> int:
    """A gid, from itself or a group's name. Raises ConfigError."""
    import grp

    if isinstance(value, str) and not value.isdecimal():
        try:
            return _looked_up(grp.getgrnam, value).gr_gid
        except KeyError:
            raise ConfigError(f"{value!r} names a group that this machine does not know") from None
    gid = value if isinstance(value, int) else _number(value)
    if isinstance(value, bool) or not 0 <= gid <= MAX_ID:
        raise ConfigError(f"{_brief(value)} is not a group")
    return gid


def option(name: str, parse: Callable[[str], _T], value: str) -> _T:
    """``parse(value)`` of the command line's option ``name``, which a refusal names. Raises UsageError."""
    try:
        return parse(value)
    except UsageError as error:
        raise UsageError(f"{name}: {error.message}") from error


def _number(digits: str) -> int:
    """MAX_ID + 1, which nobody may have, for more digits than any id has."""
    return int(digits) if len(digits) <= MAX_DIGITS else MAX_ID + 1


def _brief(value: object) -> str:
    """Shorten a number for a message: Python refuses to write numbers of some thousand digits."""
    if isinstance(value, int) and abs(value) > MAX_BYTES:
        return "a number beyond 8 EiB"
    shown = repr(value)
    return shown if len(shown) <= 60 else f"{shown[:60]}…"


def _looked_up(ask: Callable[[_A], _T], name: _A) -> _T:
    """Return what the machine's user database says, which may be a server's. Raises KeyError where it knows none,
    ConfigError where it does not answer."""
    from instantstart_fs.ipc.attempts import within  # late: numbers need no question

    try:
        return within(LOOKUP_SECONDS, lambda: ask(name))
    except TimeoutError:
        raise ConfigError(
            f"{name!r}: the machine's user database (LDAP, say) does not answer within {LOOKUP_SECONDS:g} s; "
            "numbers of users and groups (UID:GID) need none"
        ) from None


def _group_of(uid: int) -> int:
    import pwd

    try:
        return _looked_up(pwd.getpwuid, uid).pw_gid
    except KeyError:
        raise ConfigError(f"uid {uid} has no entry in the user database: write UID:GID") from None


def parse_time(text: str) -> int:
    """RFC 3339, or seconds since 1970, as nanoseconds. Raises UsageError."""
    try:
        at_ns = int(float(text) * 1e9)
    except (ValueError, OverflowError):
        try:
            moment = datetime.fromisoformat(text)
            at_ns = int((moment if moment.tzinfo else moment.astimezone()).timestamp() * 1e9)
        except (ValueError, OverflowError):
            raise UsageError(f"{text!r} is neither an RFC 3339 time nor seconds since 1970") from None
    if not 0 <= at_ns <= MAX_TIME_NS:
        raise UsageError(f"{text!r} is no time between 1970 and 2262")
    return at_ns
