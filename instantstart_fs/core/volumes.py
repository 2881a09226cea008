"""What a pod's inline volume asks for: its attributes, checked, and the pipeline that they come to. Pure.

Anybody who may create a pod writes the attributes, so they are believed in nothing. What a pod may not choose: a
directory of the node, an endpoint, the node's credentials, the pipeline's id.
"""

from __future__ import annotations

import hashlib
import re
from collections.abc import Mapping
from typing import Literal

import msgspec

from instantstart_fs.core.humanize import did_you_mean
from instantstart_fs.core.manifest import ModelSpec, PipelineSpec
from instantstart_fs.core.names import validate_model_name
from instantstart_fs.core.pasted import understand
from instantstart_fs.core.source import DirectorySource, HubSource, S3Source, parse_source
from instantstart_fs.errors import UsageError

POD = "csi.storage.k8s.io/"
"""Begins the attributes that a kubelet adds, over those that a pod may have written, if podInfoOnMount is true. With
podInfoOnMount false a pod could name any namespace: the CSIDriver object in deploy/ has it true."""
EPHEMERAL, NAMESPACE = f"{POD}ephemeral", f"{POD}pod.namespace"
MAX_ATTRIBUTES, MAX_VALUE, MAX_MODELS, MAX_GLOBS = 64, 4096, 16, 64
MAX_OWNER = 2**31 - 1
"""Of a uid or gid of a pod, as Kubernetes bounds runAsUser."""
MAX_TOKEN = 2048
_NAMESPACE = re.compile(r"[a-z0-9](?:[a-z0-9-]{0,61}[a-z0-9])?\Z")
_KNOWN = ("source", "revision", "include", "exclude", "warm", "uid", "gid")
_WARM = {"": "start", "true": "start", "start": "start", "wait": "wait", "false": "no", "no": "no"}

Warm = Literal["no", "start", "wait"]


class VolumeRequest(msgspec.Struct, frozen=True):
    """``warm``: whether publishing fills the pipeline, or waits until it is filled."""

    spec: PipelineSpec
    namespace: str
    warm: Warm


def volume_request(
    context: Mapping[str, str],
    *,
    group: str = "",
    token_file: str | None = None,
    node_credentials: bool = False,
) -> VolumeRequest:
    """What these attributes ask for.

    Args:
        context: the volume's attributes, with those of the kubelet.
        group: the volume's mount group (the pod's fsGroup), "" for none.
        token_file: a directory, where the pod brought a token; the file is the pipeline's id in it.
        node_credentials: sources are asked with the machine's credentials where the pod brings none.

    Raises:
        UsageError: with the attribute, and what it may be.
    """
    _check_sizes(context)
    if context.get(EPHEMERAL, "").lower() != "true":
        raise UsageError("only inline ephemeral volumes are served: put `csi: {driver: …}` into the pod's volumes")
    namespace = context.get(NAMESPACE, "")
    if not _NAMESPACE.match(namespace):
        raise UsageError("the pod's namespace is not told: the CSIDriver object needs podInfoOnMount: true")
    own = {name: value for name, value in context.items() if not name.startswith(POD)}
    for name in own:
        if name not in _KNOWN and not name.startswith("model."):
            known = ", ".join((*_KNOWN, "model.NAME"))
            raise UsageError(
                f"unknown volume attribute {name[:80]!r}{did_you_mean(name, list(_KNOWN))}; known: {known}"
            )
    uid, gid = _number(own, "uid"), _number(own, "gid")
    if group:
        gid = _number({"gid": group}, "gid") if gid is None else gid
    models = _models(own)
    kinds = {type(parse_source(model.source)) for model in models}
    if token_file is not None and S3Source in kinds:
        raise UsageError("a hub's token comes with an s3:// source: leave nodePublishSecretRef out")
    owned = uid is not None or gid is not None
    spec = PipelineSpec(
        id="unnamed",
        models=models,
        uid=uid or 0,
        gid=gid or 0,
        mode=0o550 if owned else 0o555,
        anonymous=token_file is None and not node_credentials,
    )
    name = _pipeline_id(namespace, spec, bool(token_file))
    where = f"{token_file}/{name}" if token_file is not None else None
    return VolumeRequest(msgspec.structs.replace(spec, id=name, token_file=where), namespace, _warm(own))


def _check_sizes(context: Mapping[str, str]) -> None:
    if len(context) > MAX_ATTRIBUTES:
        raise UsageError(f"{len(context)} volume attributes; at most {MAX_ATTRIBUTES}")
    for name, value in context.items():
        if len(name) > 256 or len(value) > MAX_VALUE:
            raise UsageError(f"volume attribute {name[:80]!r} is longer than {MAX_VALUE} characters")
        if any(ord(character) < 32 and character not in "\n\t" for character in name + value):
            raise UsageError(f"volume attribute {name[:80]!r} holds control characters")


def _models(own: Mapping[str, str]) -> tuple[ModelSpec, ...]:
    named = {name.removeprefix("model."): value for name, value in own.items() if name.startswith("model.")}
    source = own.get("source", "")
    if bool(source) == bool(named):
        raise UsageError("give either the volume attribute source, or model.NAME for each model")
    if len(named) > MAX_MODELS:
        raise UsageError(f"{len(named)} models; at most {MAX_MODELS}")
    if named and "revision" in own:
        raise UsageError("revision goes with source; of a model.NAME write hf://org/repo@revision")
    if named and "" in named:
        raise UsageError("'model.' lacks its name")
    include, exclude = _globs(own, "include"), _globs(own, "exclude")
    wanted = sorted(named.items()) or [("", source)]
    return tuple(_model(name, text, own.get("revision", ""), include, exclude) for name, text in wanted)


def _model(name: str, text: str, revision: str, include: tuple[str, ...], exclude: tuple[str, ...]) -> ModelSpec:
    validate_model_name(name)
    pasted = understand(text)
    found = parse_source(pasted.source)
    if isinstance(found, DirectorySource):
        raise UsageError("a pod may not name a directory of the node: use hf://org/repo or s3://bucket/prefix")
    if revision:
        if not isinstance(found, HubSource):
            raise UsageError("only a hub's repository has a revision")
        if "@" in pasted.source:
            raise UsageError("the revision is given twice: in source and in revision")
        found = parse_source(f"hf://{found.repo}@{revision}")
    return ModelSpec(str(found), name, (*pasted.include, *include), exclude)


def _globs(own: Mapping[str, str], name: str) -> tuple[str, ...]:
    found = tuple(glob.strip() for glob in re.split(r"[,\n]", own.get(name, "")) if glob.strip())
    if len(found) > MAX_GLOBS:
        raise UsageError(f"{name}: {len(found)} patterns; at most {MAX_GLOBS}")
    return found


def _number(own: Mapping[str, str], name: str) -> int | None:
    text = own.get(name)
    if text is None:
        return None
    if not re.fullmatch(r"[0-9]{1,10}", text) or int(text) > MAX_OWNER:
        raise UsageError(f"{name}: {text[:40]!r} is not a number from 0 to {MAX_OWNER}")
    return int(text)


def _warm(own: Mapping[str, str]) -> Warm:
    try:
        return _WARM[own.get("warm", "").strip().lower()]  # type: ignore[return-value]
    except KeyError:
        raise UsageError(f"warm: {own['warm'][:40]!r} is none of true, false, wait") from None


def _pipeline_id(namespace: str, spec: PipelineSpec, with_token: bool) -> str:
    """``namespace.model.digest``: equal for all pods of one namespace that ask for the same, and for no others. The
    token itself is no part of it: a rotated one must not fetch everything again."""
    asked = msgspec.json.encode((namespace, spec.models, spec.uid, spec.gid, spec.mode, spec.anonymous, with_token))
    first = spec.models[0].source.partition("@")[0].rstrip("/").rpartition("/")[2]
    readable = re.sub(r"[^A-Za-z0-9_-]+", "-", first).strip("-")[:40] or "model"
    return f"{namespace}.{readable}.{hashlib.sha256(asked).hexdigest()[:12]}"
