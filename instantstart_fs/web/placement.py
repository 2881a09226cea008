"""GET /v1/placement/ID, on the page and the control socket: which hosts of the region hold a pipeline. It is for
autoscalers.

A pipeline that the caller may not see is answered as if it did not exist.
"""

from __future__ import annotations

import msgspec
from starlette.responses import JSONResponse, Response

from instantstart_fs.core.sight import Sight
from instantstart_fs.errors import InstantStartError, PipelineNotFound
from instantstart_fs.library import Library

PREFIX = "/v1/placement/"


async def placement(library: Library, pipeline: str, sight: Sight, *, details: bool) -> Response:
    """Answer the caller. ``details``: whether to say why the tier does not answer."""
    if not library.pipelines.shown_to(pipeline, sight):
        return _failed("pipeline-not-found", f"there is no pipeline {pipeline}", 404)
    if library.heartbeats is None:
        return _failed("no-region", "there is no [regional] in the configuration", 404)
    try:
        found = await library.heartbeats.placement(pipeline)
    except PipelineNotFound:
        return _failed("pipeline-not-found", f"there is no pipeline {pipeline}", 404)
    except InstantStartError as error:
        return _failed("tier-unavailable", error.message if details else "", 503)
    return JSONResponse(msgspec.to_builtins(found))


def _failed(code: str, message: str, status: int) -> Response:
    headers = {"Retry-After": "10"} if status == 503 else {}
    return JSONResponse({"error": {"code": code, "message": message}}, status, headers=headers)
