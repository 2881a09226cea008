"""Settings that all origins of a daemon share. A pipeline's token_file, aws_profile and endpoint_url override them."""

from __future__ import annotations

import msgspec

from instantstart_fs.config import HuggingFaceConfig, S3Config
from instantstart_fs.origins.bounds import Bounds


class OriginSettings(msgspec.Struct, frozen=True):
    """Settings of all origins. ``timeout``: seconds without an answer (connecting, or between two bytes) after which a
    request is given up. ``bounds``: of a listing."""

    huggingface: HuggingFaceConfig = HuggingFaceConfig()
    s3: S3Config = S3Config()
    timeout: float = 20.0
    bounds: Bounds = Bounds()
    allow_private: tuple[str, ...] = ()
    """[origins] allow_private."""
