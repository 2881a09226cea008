"""Opens a tier's storage from what the configuration says of it."""

from __future__ import annotations

from urllib.parse import unquote, urlsplit

from instantstart_fs.errors import ConfigError
from instantstart_fs.regional.directory import DirectoryStore
from instantstart_fs.regional.s3 import S3Store
from instantstart_fs.regional.store import TierStore


def open_store(
    url: str, *, endpoint_url: str | None = None, region_name: str | None = None, profile: str | None = None
) -> TierStore:
    """Open the storage at ``url``: s3://bucket/prefix or file:///directory. Asks nobody. Raises ConfigError."""
    parts = urlsplit(url)
    if parts.scheme == "s3" and parts.netloc and not parts.query:
        return S3Store(
            parts.netloc,
            parts.path.strip("/"),
            endpoint_url=endpoint_url,
            region_name=region_name,
            profile=profile,
        )
    if parts.scheme == "file" and not parts.netloc and len(parts.path) > 1:
        return DirectoryStore(unquote(parts.path).rstrip("/"))
    raise ConfigError(f"regional.url: {url!r} is neither s3://bucket/prefix nor file:///directory")
