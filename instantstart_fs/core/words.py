"""Amounts in words, the same on the command line and on the page. Pure."""

from __future__ import annotations


def human_bytes(count: float) -> str:
    """Decimal units, as disks and networks are sold: 90.9 MB."""
    if count < 1000:
        return f"{count:.0f} B"
    for unit in ("kB", "MB", "GB", "TB", "PB"):
        count /= 1000
        if count < 999.5 or unit == "PB":
            break
    return f"{count:.2f} {unit}" if count < 10 else f"{count:.1f} {unit}" if count < 100 else f"{count:.0f} {unit}"


def human_seconds(seconds: float) -> str:
    seconds = round(seconds)
    if seconds < 60:
        return f"{seconds} s"
    if seconds < 3600:
        return f"{seconds // 60} min {seconds % 60} s"
    if seconds < 48 * 3600:
        return f"{seconds // 3600} h {seconds % 3600 // 60} min"
    return f"{seconds // 86400} days"
