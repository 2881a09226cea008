"""Reads a pipeline's table of config.toml or pipelines.d into a PipelineSpec."""

from __future__ import annotations

import os
from collections.abc import Mapping
from typing import Any

import msgspec

from instantstart_fs.config.located import At, Table, convert
from instantstart_fs.config.units import parse_mode, parse_owner, parse_size
from instantstart_fs.core.manifest import ModelSpec, PipelineSpec
from instantstart_fs.core.names import validate_model_name, validate_pipeline_id
from instantstart_fs.errors import ConfigError, UsageError


class _Model(Table):
    source: str
    include: tuple[str, ...] = ()
    exclude: tuple[str, ...] = ()


class PipelineTable(Table):
    source: str | None = None
    models: dict[str, str | _Model] = msgspec.field(default_factory=dict)
    include: tuple[str, ...] = ()
    exclude: tuple[str, ...] = ()
    owner: str | None = None
    mode: str | int = 0o555
    token_file: str | None = None
    aws_profile: str | None = None
    endpoint_url: str | None = None
    pinned: bool = False
    quota: str | int | None = None
    anonymous: bool = False
    requester_pays: bool = False


def read_pipeline(name: str, table: Mapping[str, Any] | PipelineTable, file: str, key: str) -> PipelineSpec:
    """The spec of the pipeline ``name``; ``file`` and ``key`` say where its table stands. Raises ConfigError."""
    at = At(file)
    prefix = f"{key}." if key else ""
    raw = table if isinstance(table, PipelineTable) else convert(table, PipelineTable, file, prefix)
    try:
        validate_pipeline_id(name)
        if (raw.source is None) == (not raw.models):
            raise ConfigError("give either `source` or a `models` table")
        models: list[ModelSpec] = []
        if raw.source is not None:
            models.append(_model(raw.source, "", raw.include, raw.exclude))
        for model, value in raw.models.items():
            entry = _Model(value) if isinstance(value, str) else value
            if not model:
                raise ConfigError("a model in `models` needs a name")
            include, exclude = entry.include or raw.include, entry.exclude or raw.exclude
            models.append(_model(entry.source, validate_model_name(model), include, exclude))
        uid, gid = parse_owner(raw.owner) if raw.owner is not None else (os.geteuid(), os.getegid())
        mode = parse_mode(raw.mode)
        if raw.anonymous and raw.aws_profile is not None:
            raise ConfigError("anonymous and aws_profile exclude each other")
    except UsageError as error:
        raise at.fail(key, error.message) from error
    at.s3_url(f"{prefix}endpoint_url", raw.endpoint_url)
    return PipelineSpec(
        id=name,
        models=tuple(models),
        uid=uid,
        gid=gid,
        mode=mode,
        token_file=at.secret_file(f"{prefix}token_file", raw.token_file),
        aws_profile=raw.aws_profile,
        endpoint_url=raw.endpoint_url,
        pinned=raw.pinned,
        anonymous=raw.anonymous,
        requester_pays=raw.requester_pays,
        quota=None if raw.quota is None else at.parsed(f"{prefix}quota", parse_size, raw.quota),
    )


def _model(text: str, name: str, include: tuple[str, ...], exclude: tuple[str, ...]) -> ModelSpec:
    """Read a model by the rules of ``add``, except for paths that begin with a dot: a file has no directory of its own
    to resolve them in."""
    from instantstart_fs.core.pasted import understand  # late: only a configured pipeline needs it

    pasted = understand(text, home=os.path.expanduser("~"))
    return ModelSpec(pasted.source, name, (*pasted.include, *include), exclude)
