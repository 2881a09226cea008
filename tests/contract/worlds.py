"""The three origins behind one face for the contract suite: put files there, replace them, open the origin."""

from __future__ import annotations

import itertools
import os
import urllib.error
import urllib.request
from pathlib import Path
from typing import Protocol
from urllib.parse import unquote

from instantstart_fs.config import HuggingFaceConfig, S3Config
from instantstart_fs.core.manifest import ModelSpec, PipelineSpec
from instantstart_fs.origins.base import Location, Origin
from instantstart_fs.origins.bounds import Bounds
from instantstart_fs.origins.registry import OriginSettings, open_origin
from tests.servers.hub import HubServer
from tests.servers.seaweed import SeaweedServer

_numbers = itertools.count(1)
TIMEOUT = 2.0
UNBOUNDED = Bounds()


def write_files(directory: Path, files: dict[str, bytes]) -> Path:
    for path, content in files.items():
        target = directory / path
        target.parent.mkdir(parents=True, exist_ok=True)
        target.write_bytes(content)
    return directory


def fetch(location: Location, start: int, stop: int) -> bytes:
    """What a fetch worker does: one ranged GET (or pread) with the location's headers."""
    if location.url.startswith("file://"):
        with open(unquote(location.url.removeprefix("file://")), "rb") as file:
            return os.pread(file.fileno(), stop - start, start)
    headers = {**dict(location.headers), "Range": f"bytes={start}-{stop - 1}", "Accept-Encoding": "identity"}
    with urllib.request.urlopen(urllib.request.Request(location.url, headers=headers), timeout=10) as response:
        assert response.status == 206
        if location.etag is not None:
            assert response.headers["ETag"] == location.etag
        return bytes(response.read())


class World(Protocol):
    """Somewhere a model can be put."""

    source: str

    def put(self, files: dict[str, bytes]) -> None: ...

    def replace(self, path: str, content: bytes) -> None:
        """Change one file as its owner would."""
        ...

    def origin(self, source: str | None = None, **globs: tuple[str, ...]) -> Origin: ...


class HubWorld:
    def __init__(self, hub: HubServer, directory: Path) -> None:
        self.hub, self._base = hub, directory
        self.repo = f"org/model-{next(_numbers)}"
        self.source = f"hf://{self.repo}"
        self._files: dict[str, bytes] = {}

    def put(self, files: dict[str, bytes]) -> None:
        self._files |= files
        self.hub.publish(self.repo, write_files(self._base / f"commit-{next(_numbers)}", self._files))

    def replace(self, path: str, content: bytes) -> None:
        self.put({path: content})

    def origin(
        self,
        source: str | None = None,
        *,
        token_file: str | None = None,
        endpoint: str | None = None,
        bounds: Bounds = UNBOUNDED,
        **globs: tuple[str, ...],
    ) -> Origin:
        model = ModelSpec(source or self.source, **globs)
        settings = OriginSettings(
            huggingface=HuggingFaceConfig(endpoint=endpoint or self.hub.endpoint), timeout=TIMEOUT, bounds=bounds
        )
        return open_origin(PipelineSpec("p", (model,), token_file=token_file), model, settings)


class S3World:
    def __init__(self, seaweed: SeaweedServer, *, versioning: bool) -> None:
        self.seaweed = seaweed
        self.bucket = "contract-versioned" if versioning else "contract"
        self.client = seaweed.client()
        if self.bucket not in (bucket["Name"] for bucket in self.client.list_buckets()["Buckets"]):
            seaweed.new_bucket(self.bucket, versioning=versioning)
        self.prefix = f"some/model-{next(_numbers)}"
        self.source = f"s3://{self.bucket}/{self.prefix}"

    def put(self, files: dict[str, bytes]) -> None:
        for path, content in files.items():
            self.client.put_object(Bucket=self.bucket, Key=f"{self.prefix}/{path}", Body=content)

    def replace(self, path: str, content: bytes) -> None:
        self.put({path: content})

    def origin(
        self,
        source: str | None = None,
        *,
        profile: str | None = None,
        endpoint: str | None = None,
        **globs: tuple[str, ...],
    ) -> Origin:
        model = ModelSpec(source or self.source, **globs)
        settings = OriginSettings(s3=S3Config(endpoint_url=endpoint or self.seaweed.endpoint_url), timeout=TIMEOUT)
        return open_origin(PipelineSpec("p", (model,), aws_profile=profile), model, settings)


class DirectoryWorld:
    def __init__(self, directory: Path) -> None:
        self.directory = directory / "the model"
        self.directory.mkdir()
        self.source = f"file://{self.directory}"

    def put(self, files: dict[str, bytes]) -> None:
        write_files(self.directory, files)

    def replace(self, path: str, content: bytes) -> None:
        new = self.directory / (path + ".new")
        new.write_bytes(content)
        new.replace(self.directory / path)

    def origin(self, source: str | None = None, **globs: tuple[str, ...]) -> Origin:
        model = ModelSpec(source or self.source, **globs)
        return open_origin(PipelineSpec("p", (model,)), model, OriginSettings())
