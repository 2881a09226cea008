"""Turns: each user has some places, so that who is slow holds up nobody else."""

from __future__ import annotations

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

import trio


class Turns:
    """``places``: of each user at a time."""

    def __init__(self, places: int) -> None:
        self._places = places
        self._users: dict[int, _User] = {}

    @asynccontextmanager
    async def of(self, uid: int) -> AsyncIterator[None]:
        """Hold one of the user's places inside the block."""
        user = self._users.setdefault(uid, _User(self._places))
        user.count += 1
        try:
            async with user.places:
                yield
        finally:
            user.count -= 1
            if not user.count:
                self._users.pop(uid, None)

    def count(self, uid: int) -> int:
        """Return how many of the user's hold a place or wait for one."""
        user = self._users.get(uid)
        return user.count if user is not None else 0


class _User:
    def __init__(self, places: int) -> None:
        self.places = trio.Semaphore(places)
        self.count = 0
