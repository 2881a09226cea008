"""Bounds of numbers that come from outside: command line, configuration, control socket. Constants only.

One place, so that what the command line refuses is refused by the daemon as well, from any client: a rate of 1e-300
bytes a second is a job that nobody can end, and a uid of 2⁶⁴ one that the kernel's protocol cannot say.
"""

from __future__ import annotations

MAX_BYTES = (1 << 63) - 1
"""As large as a file can be."""
MIN_RATE = 1_000_000
"""Bytes a second. A terabyte takes 12 days."""
MAX_SECONDS = 1e10
"""Of a duration: 317 years."""
MAX_ID = (1 << 32) - 2
"""Of a uid or a gid; the next number means "nobody in particular" to the kernel."""
MAX_TIME_NS = (1 << 63) - 1
"""Of a wall clock, since 1970."""
MAX_DIGITS = 20
"""Of a number that somebody wrote. No bound above has as many, and reading longer ones takes time."""
