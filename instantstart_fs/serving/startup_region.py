"""Startup caches of the region. A start that finds none here takes one that another host of the region compiled, and
what is saved here goes to the tier.

A startup cache is code, and the number of a user is another user's on the next host: only those users' caches travel
who are named in the configuration, and under that name.

On the trio thread; the storage is asked in threads that are given up when it is slow. A failure means a start without
that cache, after a bounded wait. The tier is then left alone for a while.
"""

from __future__ import annotations

import contextlib
import hashlib
import itertools
import logging
import os
import pwd
import time
from collections.abc import AsyncGenerator, Awaitable, Callable, Generator, Iterable, Mapping

import msgspec
import trio

from instantstart_fs.catalog.model import Generation
from instantstart_fs.core.manifest import Manifest
from instantstart_fs.core.startupcache import StartupRecord
from instantstart_fs.errors import DigestMismatch, InstantStartError, OriginMisbehaved, OriginUnavailable
from instantstart_fs.filler.region_follow import RegionSettings, ask_tier
from instantstart_fs.ipc.threads import LentDescriptor, run_abandonable
from instantstart_fs.origins.base import Origin
from instantstart_fs.regional.records import Forged
from instantstart_fs.regional.startup import CHUNK, Entry, Piece, Place, identity_of
from instantstart_fs.regional.store import SLOWEST_PUT, put_seconds

log = logging.getLogger(__name__)

FIND_SECONDS = 3.0
"""Seconds for the question what the tier has; a start waits for it."""
PIECE_SECONDS = 10.0
"""Seconds for one piece (4 MiB) of a pack."""
PUT_SECONDS = 2 * put_seconds(CHUNK)
"""Seconds for one piece that is written, and for the seal and the record."""
SAVE_SECONDS = 600.0
"""Seconds for a whole one, beside those that it takes at SLOWEST_PUT. What the host's rate makes it wait for does not
count: write-back has its part of it."""
READ_SECONDS = 30.0
"""Seconds for one piece that is read from the store."""
TIDY_SECONDS = 60.0
REMOVE_SECONDS = 30.0
DISCARD_SECONDS = 10.0
"""Seconds for a version that was found wrong; a start waits for it."""
LEFT_ALONE = 30.0
"""Seconds without a question after one that failed."""
TRIES, AGAIN = 4, 45.0
"""How often a save is tried, and the seconds between two tries."""
MOST_WAITING = 32
"""Saves that wait for their turn, or to be tried again; beyond, they stay on this host."""
MOST_WRONG = 256
"""Packs found wrong in the tier that are remembered."""
USERS_SECONDS, USERS_AGAIN = 5.0, 60.0
"""Seconds that the daemon's start waits for the machine's user database, and those until what it did not know is asked
for again."""


class _Save(msgspec.Struct, eq=False):
    """A save that waits. ``pack`` is a descriptor of its own, ``at`` when it was asked for. ``since``: where a try
    stopped; ``tries``: how many have begun."""

    pipeline: str
    place: Place
    record: StartupRecord
    pack: int
    at: float
    since: Piece | None = None
    tries: int = 0


class RegionalStartups:
    """The startup caches of the region. Owned by the Library.

    ``users`` names those whose caches travel. ``slot_of`` returns a pipeline's slot, None where none is to be used.
    ``may_use`` says whether the pipeline's own credentials may read the source of its model at that position
    (filler/region_access.py).
    """

    def __init__(
        self,
        settings: RegionSettings,
        users: Iterable[str],
        slot_of: Callable[[str], str | None],
        may_use: Callable[[str, int, Origin], Awaitable[bool]],
    ) -> None:
        self._settings = settings
        self._users = {int(user): user for user in users if user.isdecimal()}
        self._unknown = [user for user in users if not user.isdecimal()]
        self._slot_of = slot_of
        self._may_use = may_use
        self._left_alone_until = 0.0
        self._removed: dict[str, float] = {}
        self._saves: set[_Save] = set()
        """Those that are not over: they wait, are tried, or are to be tried again."""
        self._newest: dict[str, _Save] = {}
        """Of each place, of ``_saves``."""
        self._wrong: dict[tuple[str, str], None] = {}
        """(place, digest) of packs that were found wrong in the tier, in order."""
        self._threads = trio.CapacityLimiter(8)
        self._queue, self._waiting = trio.open_memory_channel[_Save](MOST_WAITING)

    def place(self, pipeline: str, key: Mapping[str, str], manifest: Manifest, uid: int) -> Place | None:
        """Return where the startup caches of this key are; None if a pipeline has no slot, or that user's caches do not
        travel."""
        slot, user = self._slot_of(pipeline), self._users.get(uid)
        if slot is None or user is None:
            return None
        identity = identity_of(key, content_of(manifest), user)
        return Place(self._settings.stores[0], self._settings.key, slot, identity)

    async def may_use(self, generation: Generation) -> bool:
        """Whether every source of the pipeline may be read. Code that another host compiled from them needs the same
        protection. Raises OriginError, UsageError."""
        pipeline, allowed = generation.pipeline.id, True

        async def ask(model: int, origin: Origin) -> None:
            nonlocal allowed
            allowed = await self._may_use(pipeline, model, origin) and allowed

        models = range(len(generation.manifest.models))
        origins = [await trio.to_thread.run_sync(generation.origin, model) for model in models]
        async with trio.open_nursery() as nursery:
            for model, origin in enumerate(origins):
                nursery.start_soon(ask, model, origin)
        return allowed

    async def find(self, pipeline: str, place: Place) -> list[Entry]:
        """Return what the region has there, the newest first. Never raises; takes FIND_SECONDS at most."""
        if trio.current_time() < self._left_alone_until:
            return []
        try:
            return await ask_tier(place.entries, FIND_SECONDS, self._threads)
        except (InstantStartError, Forged) as error:
            self._failed(pipeline, "asked for", error)
            return []

    async def read(self, place: Place, record: StartupRecord) -> AsyncGenerator[bytes, None]:
        """Yield the pack, piece by piece, each proven. Raises OriginError; OriginMisbehaved where it is wrong, which is
        then mended: it is deleted if this host may, and a save of the same bytes writes them again."""
        pieces = place.read(record)
        for chunk in itertools.count():
            try:
                piece = await ask_tier(lambda: next(pieces, b""), PIECE_SECONDS, self._threads)
            except Forged as error:
                await self._discard(place, record, chunk)
                raise OriginMisbehaved(str(error)) from error
            if not piece:
                return
            yield piece

    def has_wrong(self, place: Place) -> bool:
        """Whether a pack there was found wrong, and not written again by this host since."""
        return any(name == place.name for name, _ in self._wrong)

    async def _discard(self, place: Place, record: StartupRecord, chunk: int) -> None:
        """Never raises."""
        self._wrong[place.name, record.digest] = None
        while len(self._wrong) > MOST_WRONG:
            del self._wrong[next(iter(self._wrong))]
        if self._settings.write_back:
            with contextlib.suppress(InstantStartError):  # a host that may delete nothing leaves it to others
                await ask_tier(lambda: place.discard(record, chunk), DISCARD_SECONDS, self._threads)

    async def remove(self, place: Place) -> int:
        """Delete all versions there, and those of this host that wait to be saved; how many there were. Raises
        OriginError, also where this host may not write to the tier: what is left there comes back at the next start."""
        if not self._settings.write_back:
            if await ask_tier(place.entries, REMOVE_SECONDS, self._threads):
                raise OriginUnavailable("this host writes nothing to the tier (write_back = false): use another")
            return 0
        self._removed[place.name] = trio.current_time()
        return await ask_tier(place.remove, REMOVE_SECONDS, self._threads)

    def put(self, pipeline: str, place: Place, record: StartupRecord, pack: int) -> None:
        """Have the pack saved in the tier later. Takes the descriptor over."""
        if not self._settings.write_back:
            os.close(pack)
            return
        if len(self._saves) >= MOST_WAITING:
            os.close(pack)
            log.warning("a startup cache stays on this host: too many wait", extra={"pipeline": pipeline})
            return
        save = _Save(pipeline, place, record, pack, trio.current_time())
        self._saves.add(save)
        self._newest[place.name] = save
        self._queue.send_nowait(save)

    async def run(self, *, task_status: trio.TaskStatus[None] = trio.TASK_STATUS_IGNORED) -> None:
        """Save what waits, until cancelled."""
        async with trio.open_nursery() as nursery:
            asked = trio.Event()
            nursery.start_soon(self._find_users, asked)
            with trio.move_on_after(USERS_SECONDS) as scope:
                await asked.wait()
            if scope.cancelled_caught:
                log.warning(
                    "the machine's user database (LDAP, say) does not answer within %g s: startup caches of %s "
                    "stay on this host until it does",
                    *(USERS_SECONDS, ", ".join(self._unknown)),
                )
            task_status.started()
            await self._save_all()

    async def _find_users(self, asked: trio.Event) -> None:
        """Learn the named users' numbers. In a thread that is given up at the end: what answers may be a server that is
        gone. There is never more than one."""
        told = set[str]()
        while self._unknown:
            for user in tuple(self._unknown):
                number = await run_abandonable(_number_of, user)
                if number is not None:
                    self._users[number] = user
                    self._unknown.remove(user)
                elif user not in told:
                    told.add(user)
                    log.warning("[regional] startup_caches: there is no user %s on this host", user)
            asked.set()
            await trio.sleep(USERS_AGAIN)
        asked.set()

    async def _save_all(self) -> None:
        """One at a time, as they come. One that has failed waits for its next try beside the queue, not in its
        front."""
        try:
            async with trio.open_nursery() as pausing:
                async for save in self._waiting:
                    over = True
                    try:
                        over = await self._save(save)
                    except Exception:  # one cache is not worth the daemon
                        log.exception("a startup cache stays on this host", extra={"pipeline": save.pipeline})
                    if over:
                        self._end(save)
                    else:
                        pausing.start_soon(self._queue_again, save)
        finally:
            for save in tuple(self._saves):
                self._end(save)

    async def _queue_again(self, save: _Save) -> None:
        await trio.sleep(AGAIN)
        self._queue.send_nowait(save)

    def _end(self, save: _Save) -> None:
        os.close(save.pack)
        self._saves.remove(save)
        if self._newest.get(save.place.name) is save:
            del self._newest[save.place.name]
        if not self._saves:
            self._removed.clear()

    async def _save(self, save: _Save) -> bool:
        """Try once; whether no other try is to follow."""
        newest, withdrawn = self._newest.get(save.place.name), self._is_withdrawn(save)
        if newest is not save and (newest is None or newest.tries or not withdrawn):
            return True  # a newer one is there, or will be
        if withdrawn and not save.tries:
            return True
        save.tries += 1
        try:
            if not withdrawn and await self._put(save):
                log.info("startup cache %d is the region's, too", save.record.number, extra={"pipeline": save.pipeline})
            if self._is_withdrawn(save):  # meanwhile, and a try that failed may have put it there
                await ask_tier(save.place.remove, REMOVE_SECONDS, self._threads)
        except (InstantStartError, OSError) as error:
            if save.tries < TRIES and not isinstance(error, DigestMismatch):
                return False
            self._failed(save.pipeline, "saved", error)
        return True

    def _is_withdrawn(self, save: _Save) -> bool:
        return self._removed.get(save.place.name, -1.0) >= save.at

    async def _put(self, save: _Save) -> bool:
        """Whether it was not there. Goes on where a try before stopped. Raises OriginError, DigestMismatch, OSError."""
        record, wrong = save.record, (save.place.name, save.record.digest)
        saving = save.place.saving(
            *(record, record.host or self._settings.host, time.time()), since=save.since, mend=wrong in self._wrong
        )
        limit, spent = SAVE_SECONDS + record.size / SLOWEST_PUT, 0.0
        data: bytes | None = None
        while True:
            began = trio.current_time()
            wanted = await ask_tier(_Step(saving, data), PUT_SECONDS, self._threads)
            spent += trio.current_time() - began
            if not isinstance(wanted, Piece):
                break
            save.since = wanted
            if spent > limit:
                raise OriginUnavailable(f"the regional tier does not take {record.size} bytes within {limit:.0f} s")
            await self._settings.rate.wait(wanted.length)
            data = await _read(save.pack, wanted)
        self._wrong.pop(wrong, None)
        if wanted:
            with contextlib.suppress(InstantStartError):  # a host that may delete nothing leaves it to others
                await ask_tier(save.place.tidy, TIDY_SECONDS, self._threads)
        return wanted

    def _failed(self, pipeline: str, what: str, error: Exception) -> None:
        self._left_alone_until = trio.current_time() + LEFT_ALONE
        said = error.message if isinstance(error, InstantStartError) else str(error)
        log.warning("a startup cache could not be %s in the region: %s", what, said, extra={"pipeline": pipeline})


class _Step:
    """One piece of a save, for a thread: what is wanted next, or whether it was not there."""

    def __init__(self, saving: Generator[Piece, bytes, bool], data: bytes | None) -> None:
        self._saving = saving
        self._data = data

    def __call__(self) -> Piece | bool:
        try:
            return next(self._saving) if self._data is None else self._saving.send(self._data)
        except StopIteration as end:
            return bool(end.value)


async def _read(pack: int, piece: Piece) -> bytes:
    """A piece of a pack in the store. Raises OSError; TimeoutError where the disk does not answer."""
    lent = LentDescriptor(pack)

    def read() -> bytes:
        with lent.taken() as fd:
            return os.pread(fd, piece.length, piece.at)

    try:
        return await run_abandonable(read, deadline=READ_SECONDS)
    except trio.TooSlowError:
        raise TimeoutError(f"a startup cache cannot be read within {READ_SECONDS:g} s") from None
    finally:
        lent.close()


def _number_of(user: str) -> int | None:
    """None where the machine does not know the user."""
    try:
        return pwd.getpwnam(user).pw_uid
    except (KeyError, ValueError, OSError):
        return None


def content_of(manifest: Manifest) -> str:
    """Return a digest of a generation's content. It is the same on all hosts that pinned the same bytes."""
    models = [
        (model.name, model.revision, [(file.path, file.size, str(file.digest), file.version) for file in model.files])
        for model in manifest.models
    ]
    return hashlib.sha256(msgspec.json.encode(models)).hexdigest()
