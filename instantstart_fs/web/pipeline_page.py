"""The routes of one pipeline: its page /pipelines/ID, and the same as JSON at /api/pipelines/ID.

Answers are made for each request and not kept. Callers see what app.py lets them see; the processes that use a pipeline
are shown to those who may see everything.
"""

from __future__ import annotations

import time
from collections.abc import Callable

import msgspec
from starlette.requests import Request
from starlette.responses import JSONResponse, Response
from starlette.routing import Route

from instantstart_fs.core.sight import Sight
from instantstart_fs.errors import InstantStartError, PipelineNotFound
from instantstart_fs.library import Library
from instantstart_fs.web.pipeline_view import MAX_LISTED, PipelineView, pipeline_view


class PipelinePages:
    """The handlers. ``sight_of`` says what the sender of a request may see; ``render`` fills the named template with
    ``view``."""

    def __init__(
        self,
        library: Library,
        sight_of: Callable[[Request], Sight],
        render: Callable[[str, PipelineView | None], str],
        *,
        details: bool,
    ) -> None:
        self._library = library
        self._sight_of = sight_of
        self._render = render
        self._details = details

    def routes(self) -> list[Route]:
        return [Route("/pipelines/{pipeline}", self.page), Route("/api/pipelines/{pipeline}", self.values)]

    async def page(self, request: Request) -> Response:
        found = await self._view(request)
        text = self._render("pipeline.html", found)
        return Response(text, 200 if found is not None else 404, media_type="text/html; charset=utf-8")

    async def values(self, request: Request) -> Response:
        found = await self._view(request)
        if found is None:
            return JSONResponse({"error": "pipeline-not-found"}, 404)
        return JSONResponse(msgspec.to_builtins(found))

    async def _view(self, request: Request) -> PipelineView | None:
        """Return the pipeline's view; None where it does not exist or the caller may not see it."""
        pipeline, sight = request.path_params["pipeline"], self._sight_of(request)
        library = self._library
        if not library.pipelines.shown_to(pipeline, sight):
            return None
        try:
            status = library.pipelines.status(pipeline, with_files=False)
            if status.listed is not None and status.listed.count <= MAX_LISTED:
                try:
                    await library.pipelines.ensure_loaded(pipeline)
                    status = library.pipelines.status(pipeline)
                except PipelineNotFound:
                    raise
                except InstantStartError:
                    pass  # its files cannot be read now: the rest is shown
            used_by = await library.admin.used_by(pipeline) if sight.everything else None
        except PipelineNotFound:
            return None
        return pipeline_view(
            status,
            library.telemetry.cold_starts(pipeline),
            used_by,
            time.time(),
            details=self._details,
            everything=sight.everything,
        )
