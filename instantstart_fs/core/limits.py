"""Bounds of numbers that come from outside: command line, configuration, control socket. Constants only.

One place, so that what the command line refuses is refused by the daemon as well, from any client: a rate of 1e-300
bytes a second is a job that nobody can end, and a uid of 2⁶⁴ one that the kernel's protocol cannot say.
"""

from __future__ import annotations

MAX_BYTES = (1 << 63) - 1
"""The largest size of a file."""
MIN_RATE = 1_000_000
"""The lowest rate, in bytes a second. A terabyte takes 12 days with it."""
MAX_SECONDS = 1e10
"""The longest duration: 317 years."""
MAX_ID = (1 << 32) - 2
"""The largest uid or gid. The next number means "nobody in particular" to the kernel."""
MAX_TIME_NS = (1 << 63) - 1
"""The latest time of a wall clock, in ns since 1970."""
MAX_DIGITS = 20
"""The most digits of a number that somebody wrote. No bound above has as many, and reading longer ones takes time."""
