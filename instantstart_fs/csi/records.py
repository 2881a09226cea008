"""What the driver remembers over a restart: a small file for each published volume, and the tokens of their pods.

    STATE/volumes/SHA256.json     one volume; written before it is mounted, removed after it is unmounted
    STATE/tokens/PIPELINE         0600; there while a volume of that pipeline is published; it has opened the source
    STATE/tokens/.brought-…       0600; while it is asked whether it opens the source
    STATE/accepted/PIPELINE       a salted digest of the token that opened the source last: who brings it again is
                                  served though the source is down, and nobody can read it there

The directory has the same path for the driver and for the daemon, which reads the tokens.
"""

from __future__ import annotations

import contextlib
import hashlib
import hmac
import logging
import os
from collections.abc import Iterator

import msgspec

from instantstart_fs.core.manifest import PipelineSpec

log = logging.getLogger(__name__)

SALT = 16
"""Bytes of the salt."""


class Volume(msgspec.Struct, frozen=True):
    """A volume that is published at ``target``, or is about to be."""

    volume_id: str
    target: str
    spec: PipelineSpec


class Records:
    """The records in the state directory. The caller never makes two calls about one volume at once."""

    def __init__(self, directory: str) -> None:
        """Raises OSError when the directories cannot be made."""
        self.tokens = f"{directory}/tokens"
        self._volumes = f"{directory}/volumes"
        self._accepted = f"{directory}/accepted"
        for path in (directory, self.tokens, self._volumes, self._accepted):
            os.makedirs(path, 0o700, exist_ok=True)
            os.chmod(path, 0o700)

    def _path(self, volume_id: str) -> str:
        return f"{self._volumes}/{hashlib.sha256(volume_id.encode()).hexdigest()}.json"

    def get(self, volume_id: str) -> Volume | None:
        return _read(self._path(volume_id))

    def all(self) -> list[Volume]:
        found = (_read(f"{self._volumes}/{name}") for name in os.listdir(self._volumes) if name.endswith(".json"))
        return [volume for volume in found if volume is not None]

    def put(self, volume: Volume) -> None:
        _replace(self._path(volume.volume_id), msgspec.json.encode(volume))

    def delete(self, volume_id: str) -> None:
        with contextlib.suppress(FileNotFoundError):
            os.unlink(self._path(volume_id))

    # -- tokens ----------------------------------------------------------------------------------------------------

    def token(self, pipeline: str) -> str | None:
        try:
            with open(f"{self.tokens}/{pipeline}", encoding="ascii") as file:
                return file.read()
        except (FileNotFoundError, UnicodeDecodeError):
            return None

    def put_token(self, pipeline: str, token: str | None) -> None:
        """Keep the pipeline's token; None removes it."""
        if token is not None:
            _replace(f"{self.tokens}/{pipeline}", token.encode("ascii"))
            return
        with contextlib.suppress(FileNotFoundError):
            os.unlink(f"{self.tokens}/{pipeline}")

    @contextlib.contextmanager
    def brought(self, pipeline: str, token: str) -> Iterator[str]:
        """Yield the path of a file that holds a token which is not proven yet. It exists inside the block. No id begins
        with a dot, so it is no pipeline's."""
        path = f"{self.tokens}/.brought-{pipeline}"
        _replace(path, token.encode("ascii"))
        try:
            yield path
        finally:
            with contextlib.suppress(FileNotFoundError):
                os.unlink(path)

    def accepted(self, pipeline: str, token: str) -> bool:
        """Whether ``token`` is the one that opened the pipeline's source last."""
        try:
            with open(f"{self._accepted}/{pipeline}", "rb") as file:
                found = file.read(64)
        except FileNotFoundError:
            return False
        return hmac.compare_digest(found, _salted(found[:SALT], token))

    def accept(self, pipeline: str, token: str) -> None:
        _replace(f"{self._accepted}/{pipeline}", _salted(os.urandom(SALT), token))

    def sweep_tokens(self) -> None:
        """Remove tokens that no volume needs. A driver that was killed may have left them."""
        needed = {volume.spec.id for volume in self.all()}
        for name in os.listdir(self.tokens):
            if name not in needed:
                self.put_token(name, None)


def _salted(salt: bytes, token: str) -> bytes:
    return salt + hmac.digest(salt, token.encode("ascii"), "sha256")


def _read(path: str) -> Volume | None:
    try:
        with open(path, "rb") as file:
            return msgspec.json.decode(file.read(), type=Volume)
    except FileNotFoundError:
        return None
    except msgspec.DecodeError as error:
        log.warning("%s is no record of a volume (%s); it is left out", path, error)
        return None


def _replace(path: str, content: bytes) -> None:
    """Replace the file's content. A crash leaves the old content or the new."""
    directory = os.path.dirname(path)
    partial = f"{path}.new-{os.getpid()}-{hashlib.sha256(os.urandom(8)).hexdigest()[:8]}"
    descriptor = os.open(partial, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o600)
    try:
        with open(descriptor, "wb") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
        os.rename(partial, path)
    except BaseException:
        with contextlib.suppress(FileNotFoundError):
            os.unlink(partial)
        raise
    holder = os.open(directory, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        os.fsync(holder)
    finally:
        os.close(holder)
