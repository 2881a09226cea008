"""Asks origins what a source holds now, and whether a pipeline's own credentials may fetch it.

lifecycle.py acts on the answers. Each question has a deadline and a thread of its own, and a process of its own if the
listing is large.
"""

from __future__ import annotations

import logging
from collections.abc import Sequence

import msgspec
import trio

from instantstart_fs.admin.access_proof import prove_access
from instantstart_fs.catalog.catalog import Catalog
from instantstart_fs.catalog.model import Generation
from instantstart_fs.core import access
from instantstart_fs.core.chunks import MAX_CHUNKS
from instantstart_fs.core.manifest import ManifestFile, ModelManifest, ModelSpec, PipelineSpec
from instantstart_fs.core.names import validate_origin_paths
from instantstart_fs.errors import (
    InstantStartError,
    InvalidName,
    OriginMisbehaved,
    OriginUnavailable,
    OriginUnsupported,
)
from instantstart_fs.ipc.threads import run_abandonable
from instantstart_fs.origins.bounds import TooLarge
from instantstart_fs.origins.lister import Lister, Order, What
from instantstart_fs.origins.settings import OriginSettings

log = logging.getLogger(__name__)

RESOLVE_DEADLINE = 300.0
"""Seconds for listing and pinning one source: a million keys are a thousand S3 listing pages."""

RESOLVE_AT_ONCE = 32
"""How many sources are listed at the same time. The deadline of the others begins when their listing does."""

CHECK_DEADLINE = 60.0
"""Seconds for one source to say whether it may be fetched: a few small requests."""


class Sources:
    """Asks origins about sources. ``chunk_size``: of new generations, in bytes; a larger file than it allows is
    refused. ``settings``: of the origins, for listing processes. Use it on the trio thread."""

    def __init__(self, catalog: Catalog, chunk_size: int, settings: OriginSettings) -> None:
        self._catalog = catalog
        self._chunk_size = chunk_size
        self._settings = settings
        self._resolving = trio.Semaphore(RESOLVE_AT_ONCE)

    async def resolve(self, spec: PipelineSpec) -> tuple[ModelManifest, ...]:
        """List and pin every model. Raises OriginError, UsageError."""
        resolved: list[ModelManifest | None] = [None] * len(spec.models)
        failures: list[InstantStartError] = []

        async def one(position: int) -> None:
            model = spec.models[position]

            lister = self._lister("resolve", spec, model, RESOLVE_DEADLINE)

            def resolve() -> ModelManifest | None:
                try:
                    return self._catalog.open_origin(spec, model).resolve()
                except TooLarge:
                    log.info("%s is large: a process of its own lists it", model.source, extra={"pipeline": spec.id})
                    return lister.run()

            try:
                # Threads of their own: an origin that hangs must not use up those that read the store.
                async with self._resolving:
                    with trio.move_on_after(RESOLVE_DEADLINE) as scope:
                        resolved[position] = await run_abandonable(resolve)
                if scope.cancelled_caught:
                    raise OriginUnavailable(f"{model.source}: no answer within {RESOLVE_DEADLINE:g} s")
            except InvalidName as error:
                # The caller's own names were looked at before: this is one of the origin's.
                failures.append(OriginUnsupported(f"{model.source}: {error.message}"))
            except InstantStartError as error:
                failures.append(error)
            except Exception as error:
                failures.append(_unforeseen(spec, model, error))
            finally:
                lister.end()

        async with trio.open_nursery() as nursery:
            for position in range(len(spec.models)):
                nursery.start_soon(one, position)
        if failures:
            raise failures[0]
        models = tuple(model for model in resolved if model is not None)
        await trio.to_thread.run_sync(self._refuse_unservable, models)
        return models

    def _refuse_unservable(self, models: Sequence[ModelManifest]) -> None:
        """Refuse what the mount cannot serve. Blocks: a hundred thousand files take a moment."""
        for model in models:
            for file in model.files:
                if file.size > MAX_CHUNKS * self._chunk_size:
                    raise OriginUnsupported(
                        f"{model.source}: {file.path} has {file.size} bytes; with fill.chunk_size = {self._chunk_size} "
                        f"a file may have {MAX_CHUNKS * self._chunk_size}"
                    )
        # The origins have validated their own names; together with the models' names they must not collide either.
        validate_origin_paths(
            f"{model.name}/{file.path}" if model.name else file.path for model in models for file in model.files
        )

    def _lister(self, what: What, spec: PipelineSpec, model: ModelSpec, seconds: float) -> Lister:
        return Lister(Order(what, spec, model, self._settings, seconds))

    async def check_access(self, pipeline_id: str, token_file: str | None = None) -> tuple[str, ...]:
        """Prove that every source may be fetched with the pipeline's own credentials, or with the hub token in
        ``token_file``; return the sources.

        New clients are used, since an earlier one may have been allowed more. Raises OriginError.
        """
        pipeline = self._catalog.pipeline(pipeline_id)
        await self._catalog.ensure_loaded(pipeline)  # its own files are the best proof
        spec = pipeline.spec
        if token_file is not None:
            spec = msgspec.structs.replace(spec, token_file=token_file, anonymous=False)
        for model in spec.models:
            await self.check_source(spec, model, fetch=True)
        return tuple(model.source for model in spec.models)

    async def check_source(self, spec: PipelineSpec, model: ModelSpec, *, fetch: bool = False) -> None:
        """Prove the same for one source. ``fetch``: also by one byte of its pinned files, if they are in memory."""
        pipeline = self._catalog.pipelines.get(spec.id)
        pinned: tuple[ManifestFile, ...] = ()
        if pipeline is not None and isinstance(pipeline.head, Generation):
            for found in pipeline.head.manifest.models:
                if (found.name, found.source) == (model.name, model.source):
                    pinned = found.files

        lister = self._lister("check", spec, model, CHECK_DEADLINE)

        def check() -> None:
            origin = self._catalog.open_origin(spec, model)
            try:
                origin.check()
            except TooLarge:
                lister.run()
            if fetch and access.asks_somebody([model.source]):
                prove_access(origin, pinned)

        with trio.move_on_after(CHECK_DEADLINE) as scope:
            try:
                await run_abandonable(check)
            except InstantStartError:
                raise
            except Exception as error:
                raise _unforeseen(spec, model, error) from error
            finally:
                lister.end()
        if scope.cancelled_caught:
            raise OriginUnavailable(f"{model.source}: no answer within {CHECK_DEADLINE:g} s")


def _unforeseen(spec: PipelineSpec, model: ModelSpec, error: Exception) -> OriginMisbehaved:
    """Turn an exception that the origin's module did not translate into an error. The log has the traceback; the
    message repeats nothing that may hold a signature."""
    log.error("%s cannot be read", model.source, exc_info=error, extra={"pipeline": spec.id})
    return OriginMisbehaved(f"{model.source}: {type(error).__name__} while reading what it answered; see the log")
