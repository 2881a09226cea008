"""Builds a PipelineSpec from the arguments of `add`, by the rules of a configuration file."""

from __future__ import annotations

import os

from instantstart_fs.config.units import option, parse_mode, parse_owner, parse_size
from instantstart_fs.core.manifest import ModelSpec, PipelineSpec
from instantstart_fs.core.names import validate_model_name, validate_pipeline_id
from instantstart_fs.core.pasted import understand
from instantstart_fs.core.urls import s3_url_problem
from instantstart_fs.errors import UsageError


def specification(
    pipeline: str,
    source: str | None,
    named: tuple[str, ...] = (),
    *,
    owner: str | None = None,
    mode: str = "0555",
    include: tuple[str, ...] = (),
    exclude: tuple[str, ...] = (),
    token_file: str | None = None,
    aws_profile: str | None = None,
    endpoint_url: str | None = None,
    quota: str | None = None,
    anonymous: bool = False,
    requester_pays: bool = False,
) -> PipelineSpec:
    """``named``: NAME=SOURCE each. Raises UsageError, InvalidName, InvalidSource, ConfigError."""
    validate_pipeline_id(pipeline)
    if (source is None) == (not named):
        raise UsageError(
            "give either SOURCE or --model NAME=SOURCE, not both"
            if source
            else f"SOURCE is missing: instantstart add {pipeline} hf://org/repo"
        )
    models = [_model(source, "", include, exclude)] if source is not None else []
    for text in named:
        name, equals, address = text.partition("=")
        if not equals or not name:
            raise UsageError(f"--model {text!r}: write NAME=SOURCE")
        models.append(_model(address, validate_model_name(name), include, exclude))
    if len({model.name for model in models}) != len(models):
        raise UsageError("--model: two models have the same name")
    if anonymous and aws_profile is not None:
        raise UsageError("--anonymous and --aws-profile exclude each other")
    if token_file is not None:
        token_file = os.path.abspath(os.path.expanduser(token_file))
        if not os.path.isfile(token_file):
            raise UsageError(f"--token-file: there is no file {token_file}")
    problem = s3_url_problem(endpoint_url) if endpoint_url is not None else None
    if problem is not None:
        raise UsageError(f"--endpoint-url: {problem}")
    uid, gid = option("--owner", parse_owner, owner) if owner is not None else (os.geteuid(), os.getegid())
    return PipelineSpec(
        id=pipeline,
        models=tuple(models),
        uid=uid,
        gid=gid,
        mode=option("--mode", parse_mode, mode),
        token_file=token_file,
        aws_profile=aws_profile,
        endpoint_url=endpoint_url,
        anonymous=anonymous,
        requester_pays=requester_pays,
        quota=option("--quota", parse_size, quota) if quota is not None else None,
    )


def _model(text: str, name: str, include: tuple[str, ...], exclude: tuple[str, ...]) -> ModelSpec:
    """A model of what was pasted: one file of a repository comes with what --include names."""
    directory = os.getcwd() if text.lstrip().startswith(".") else None
    pasted = understand(text, home=os.path.expanduser("~"), directory=directory)
    return ModelSpec(pasted.source, name, (*pasted.include, *include), exclude)
