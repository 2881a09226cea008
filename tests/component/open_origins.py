"""Origins of services that are known by an endpoint alone, asked without credentials."""

from __future__ import annotations

from instantstart_fs.core.manifest import ModelSpec
from instantstart_fs.core.source import HubSource, S3Source
from instantstart_fs.origins.bounds import Bounds
from instantstart_fs.origins.huggingface import HuggingFaceOrigin
from instantstart_fs.origins.s3 import S3Origin


def open_origin(scheme: str, endpoint: str | None) -> HuggingFaceOrigin | S3Origin:
    """``scheme``: "hf" or "s3". Without an ``endpoint`` the environment's."""
    if scheme == "hf":
        return HuggingFaceOrigin(
            HubSource("org/model"), ModelSpec("hf://org/model"), endpoint=endpoint, token_file=None, timeout=2
        )
    return S3Origin(
        S3Source("bucket"),
        ModelSpec("s3://bucket"),
        endpoint_url=endpoint,
        region_name=None,
        profile=None,
        timeout=2,
        bounds=Bounds(),
        anonymous=True,
    )
