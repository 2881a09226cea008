"""Builds a PipelineSpec from the arguments of `add` (command, Python client, HTTP), by the rules of a configuration
file."""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping, Sequence
from typing import TypedDict

from instantstart_fs.config.units import option, parse_mode, parse_owner, parse_size
from instantstart_fs.core.manifest import ModelSpec, PipelineSpec
from instantstart_fs.core.names import validate_model_name, validate_pipeline_id
from instantstart_fs.core.urls import s3_url_problem
from instantstart_fs.errors import UsageError


class Options(TypedDict, total=False):
    """What `add` may be told beside a source; each as the option of that name. ``owner``: "UID:GID" or names (the
    caller's own where it is left out); ``mode``: of the directories, octal ("0550"); ``quota``: a size ("50GiB");
    ``models``: name → source, in the place of one source."""

    models: Mapping[str, str]
    owner: str
    mode: str
    include: Sequence[str]
    exclude: Sequence[str]
    token_file: str
    aws_profile: str
    endpoint_url: str
    quota: str
    anonymous: bool
    requester_pays: bool


def of_options(pipeline: str, source: str | None, options: Options) -> PipelineSpec:
    """Return the specification that a program's arguments make. Raises as ``specification`` does; messages name the
    options as Python does."""
    # A bare string is a sequence, too: of globs of one character each, which nobody means.
    for name, given in (("include", options.get("include", ())), ("exclude", options.get("exclude", ()))):
        if isinstance(given, str):
            raise UsageError(f"{name}: give a list of globs, [{given!r}]")
    return specification(
        pipeline,
        source,
        tuple(f"{name}={address}" for name, address in options.get("models", {}).items()),
        owner=options.get("owner"),
        mode=options.get("mode", "0555"),
        include=tuple(options.get("include", ())),
        exclude=tuple(options.get("exclude", ())),
        token_file=options.get("token_file"),
        aws_profile=options.get("aws_profile"),
        endpoint_url=options.get("endpoint_url"),
        quota=options.get("quota"),
        anonymous=options.get("anonymous", False),
        requester_pays=options.get("requester_pays", False),
        spelled=lambda option: option,
    )


def _as_option(name: str) -> str:
    return "--" + name.replace("_", "-")


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
    spelled: Callable[[str], str] = _as_option,
) -> PipelineSpec:
    """``named``: NAME=SOURCE each; ``spelled``: how a message writes the name of an argument. Raises UsageError,
    InvalidName, InvalidSource, ConfigError."""
    validate_pipeline_id(pipeline)
    if (source is None) == (not named):
        raise UsageError(
            f"give either SOURCE or {spelled('model')} NAME=SOURCE, not both"
            if source
            else f"SOURCE is missing: instantstart add {pipeline} hf://org/repo"
        )
    models = [_model(source, "", include, exclude)] if source is not None else []
    for text in named:
        name, equals, address = text.partition("=")
        if not equals or not name:
            raise UsageError(f"{spelled('model')} {text!r}: write NAME=SOURCE")
        models.append(_model(address, validate_model_name(name), include, exclude))
    if len({model.name for model in models}) != len(models):
        raise UsageError(f"{spelled('model')}: two models have the same name")
    if anonymous and aws_profile is not None:
        raise UsageError(f"{spelled('anonymous')} and {spelled('aws_profile')} exclude each other")
    if token_file is not None:
        token_file = os.path.abspath(os.path.expanduser(token_file))
        if not os.path.isfile(token_file):
            raise UsageError(f"{spelled('token_file')}: there is no file {token_file}")
    problem = s3_url_problem(endpoint_url) if endpoint_url is not None else None
    if problem is not None:
        raise UsageError(f"{spelled('endpoint_url')}: {problem}")
    uid, gid = option(spelled("owner"), parse_owner, owner) if owner is not None else (os.geteuid(), os.getegid())
    return PipelineSpec(
        id=pipeline,
        models=tuple(models),
        uid=uid,
        gid=gid,
        mode=option(spelled("mode"), parse_mode, mode),
        token_file=token_file,
        aws_profile=aws_profile,
        endpoint_url=endpoint_url,
        anonymous=anonymous,
        requester_pays=requester_pays,
        quota=option(spelled("quota"), parse_size, quota) if quota is not None else None,
    )


def _model(text: str, name: str, include: tuple[str, ...], exclude: tuple[str, ...]) -> ModelSpec:
    """A model of what was pasted: one file of a repository comes with what --include names."""
    directory = os.getcwd() if text.lstrip().startswith(".") else None
    from instantstart_fs.core.pasted import understand  # late: only `add` needs it

    pasted = understand(text, home=os.path.expanduser("~"), directory=directory)
    return ModelSpec(pasted.source, name, (*pasted.include, *include), exclude)
