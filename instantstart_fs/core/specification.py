"""Checks a pipeline's specification, be it from a command, a configuration file or another program. Pure."""

from __future__ import annotations

from collections.abc import Sequence

from instantstart_fs.core.limits import MAX_BYTES, MAX_ID
from instantstart_fs.core.manifest import PipelineSpec
from instantstart_fs.core.names import validate_model_name, validate_pipeline_id
from instantstart_fs.errors import InvalidName, UsageError


def validate_spec(spec: PipelineSpec) -> None:
    """Check a pipeline's specification. Raises InvalidName, UsageError."""
    validate_pipeline_id(spec.id)
    names: Sequence[str] = [validate_model_name(model.name) for model in spec.models]
    if not names:
        raise InvalidName(f"{spec.id}: a pipeline needs at least one source")
    if len(set(names)) != len(names):
        raise InvalidName(f"{spec.id}: two models have the same name")
    if "" in names and len(names) > 1:
        raise InvalidName(f"{spec.id}: with several models, each needs a name (--model NAME=SOURCE)")
    if spec.mode & ~0o777:
        raise InvalidName(f"{spec.id}: mode {spec.mode:o} is not a permission mode")
    # A client may be anybody's program: what the kernel's protocol or the index cannot say would fail later, for all.
    if not (0 <= spec.uid <= MAX_ID and 0 <= spec.gid <= MAX_ID):
        raise UsageError(f"{spec.id}: owner {spec.uid}:{spec.gid} is out of range")
    if spec.quota is not None and not 0 <= spec.quota <= MAX_BYTES:
        raise UsageError(f"{spec.id}: quota {spec.quota} is not a size")
