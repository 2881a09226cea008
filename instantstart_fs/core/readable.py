"""Makes a pipeline's id of its source, for `mount`, where nobody gives one. Pure."""

from __future__ import annotations

import hashlib
import re
from collections.abc import Collection

from instantstart_fs.core.manifest import ModelSpec
from instantstart_fs.core.source import HubSource, S3Source, parse_source

_MAX = 100


def readable_id(model: ModelSpec, taken: Collection[str] = ()) -> str:
    """Qwen3-8B of hf://Qwen/Qwen3-8B; with the revision unless it is main, and the file where one was chosen. One that
    is ``taken`` gets six hexadecimal digits of the source behind it: the same ones each time. Raises InvalidSource."""
    source = parse_source(model.source)
    words = []
    match source:
        case HubSource(repo, revision):
            words.append(repo.rpartition("/")[2])
            if revision != "main":
                words.append(revision)
        case S3Source(bucket, prefix):
            words.append(prefix.rpartition("/")[2] or bucket)
        case _:
            words.append(source.path.rpartition("/")[2])
    if len(model.include) == 1:
        words.append(model.include[0].strip("/").rpartition("/")[2].rpartition(".gguf")[0])
    name = re.sub(r"[^A-Za-z0-9._-]+", "-", "-".join(word for word in words if word))
    name = re.sub(r"\A[^A-Za-z0-9]+", "", name)[:_MAX].rstrip(".-") or "model"
    if name not in taken:
        return name
    told = "\n".join((str(source), *model.include, "", *model.exclude))
    return f"{name}-{hashlib.sha256(told.encode('utf-8', 'surrogateescape')).hexdigest()[:6]}"
