"""Gives a Stage descriptors of the weight files, each as soon as some of it is there. It reads none of them.

``LeaseSource``: from a daemon, over its control socket, with a lease on the pipeline that lasts until the source is
closed. ``DirectorySource``: the files of a plain directory. A Stage closes its source when it ends.
"""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping
from typing import TYPE_CHECKING, NamedTuple, Protocol, runtime_checkable

from instantstart_fs.core.manifest import Manifest, ManifestFile, ModelManifest
from instantstart_fs.core.weights import WeightSet, scheduled, weight_set
from instantstart_fs.errors import BadWeights, PrefetchError

if TYPE_CHECKING:
    from instantstart_fs.control.client import Client


class OpenedFile(NamedTuple):
    """A file that was opened. ``fd``: open for reading; ``direct``: the same file opened O_DIRECT, None where its
    filesystem cannot. The receiver closes both."""

    path: str
    size: int
    fd: int
    direct: int | None

    def close(self) -> None:
        os.close(self.fd)
        if self.direct is not None:
            os.close(self.direct)


class Arrival(NamedTuple):
    """News of a file. ``opened``: its descriptors, with the first news. ``ranges``: [start, end) in bytes that can be
    read, and could not before (of a file that is ``complete`` at once: none are named). ``complete``: all of it is
    there, and proven. ``again``: what was read of it before is void."""

    path: str
    opened: OpenedFile | None
    ranges: tuple[tuple[int, int], ...] = ()
    complete: bool = True
    again: bool = False


class Source(Protocol):
    @property
    def weights(self) -> WeightSet: ...

    def files(self) -> Iterator[OpenedFile]:
        """Yield each weight file once, as soon as it is whole. Called once, in a thread of its own. Blocks in between.
        Raises InstantStartError for a file that will never come, and when the source is closed."""
        ...

    def close(self) -> None:
        """End it, and ``files`` with it, from any thread. Idempotent."""
        ...


@runtime_checkable
class StreamingSource(Source, Protocol):
    def arrivals(self) -> Iterator[Arrival]:
        """Yield news of files before they are whole, too. Called in the place of ``files``."""
        ...


def arrivals(source: Source) -> Iterator[Arrival]:
    """Yield what comes of any source."""
    if isinstance(source, StreamingSource):
        yield from source.arrivals()
        return
    for opened in source.files():
        yield Arrival(opened.path, opened)


class DirectorySource:
    """Every weight file that an engine would load from ``directory``, its models being the names of its directories
    when ``models`` is true. ``deadlines``: as of LeaseSource. Raises PrefetchError when it cannot be listed."""

    def __init__(
        self,
        directory: str,
        *,
        name: str | None = None,
        models: bool = False,
        deadlines: Mapping[str, float] | None = None,
    ) -> None:
        self._root = os.path.realpath(directory)
        self._weights = _weights_below(self._root, name or os.path.basename(self._root), models)
        self._deadlines = dict(deadlines or {})

    @property
    def weights(self) -> WeightSet:
        return self._weights

    def files(self) -> Iterator[OpenedFile]:
        for file in scheduled(self._weights, self._deadlines):
            yield open_file(os.path.join(self._root, file.path), file.path, file.size)

    def close(self) -> None:
        pass


def open_file(location: str, path: str, size: int) -> OpenedFile:
    """Open a weight file. Raises PrefetchError if it cannot be opened, BadWeights if its size is another."""
    try:
        fd = os.open(location, os.O_RDONLY | os.O_CLOEXEC)
    except OSError as error:
        raise PrefetchError(f"{path} cannot be opened: {error.strerror}") from error
    found = os.fstat(fd).st_size
    if found != size:
        os.close(fd)
        raise BadWeights(f"{path} has {found} bytes and should have {size}")
    try:
        direct = os.open(location, os.O_RDONLY | os.O_CLOEXEC | os.O_DIRECT)
    except OSError:
        direct = None
    return OpenedFile(path, size, fd, direct)


def _weights_below(root: str, name: str, models: bool) -> WeightSet:
    found: dict[str, list[ManifestFile]] = {}
    try:
        for directory, _, names in os.walk(root):
            for file in names:
                location = os.path.join(directory, file)
                path = os.path.relpath(location, root)
                model, _, rest = path.partition(os.sep) if models and os.sep in path else ("", "", path)
                found.setdefault(model, []).append(ManifestFile(rest, os.stat(location).st_size, address=""))
    except OSError as error:
        raise PrefetchError(f"{root} cannot be listed: {error.strerror}") from error
    manifests = tuple(
        ModelManifest(model, root, "", tuple(sorted(files, key=lambda file: file.path)))
        for model, files in sorted(found.items())
    )
    return weight_set(Manifest(name, 0, 1, manifests, 0))


class LeaseSource:
    """A pipeline of a daemon, leased; a cold one is filled, its chunks coming as each is there.

    Raises DaemonUnreachable, PermissionRefused, PipelineNotFound. ``path``: the daemon's socket. ``deadlines``: model →
    seconds, the same as for ``plan``: files come, and are fetched, in that order. ``stream``: False = each file comes
    as it is whole.
    """

    def __init__(
        self,
        pipeline: str,
        path: str | None = None,
        *,
        deadlines: Mapping[str, float] | None = None,
        stream: bool = True,
    ) -> None:
        from instantstart_fs.control.client import Client

        self._client: Client = Client(path)
        try:
            self._opened = self._client.open(pipeline, deadlines, stream=stream)
        except BaseException:
            self._client.close()
            raise

    @property
    def weights(self) -> WeightSet:
        return self._opened.weights

    def files(self) -> Iterator[OpenedFile]:
        """See Source. Call this or ``arrivals``."""
        early: dict[str, OpenedFile] = {}
        try:
            for arrival in self.arrivals():
                if arrival.again and (void := early.pop(arrival.path, None)) is not None:
                    void.close()
                if arrival.opened is not None:
                    early[arrival.path] = arrival.opened
                if arrival.complete and arrival.path in early:
                    yield early.pop(arrival.path)
        finally:
            for opened in early.values():
                opened.close()

    def arrivals(self) -> Iterator[Arrival]:
        sizes = {file.path: file.size for file in self.weights.files}
        for part, fds in self._opened.parts():
            opened = None
            if fds:
                opened = OpenedFile(part.path, sizes.get(part.path, -1), fds[0], fds[1] if len(fds) > 1 else None)
                found = os.fstat(opened.fd).st_size
                if found != opened.size:
                    opened.close()
                    raise BadWeights(f"{part.path} has {found} bytes in the store and should have {opened.size}")
            yield Arrival(part.path, opened, part.ranges, part.complete, part.again)

    def wait_ended(self, timeout: float) -> bool:
        """Whether the lease ended (the daemon did) within ``timeout`` seconds; asked after ``files`` has ended."""
        return self._opened.wait_ended(timeout)

    def close(self) -> None:
        self._client.close()
